"""Trains with TRL's GRPOTrainer (PyTorch) and the certainty-weighted KL penalty in place of TRL's uniform penalty.

    pip install torch trl
    python examples/torch_trl.py

The adapter is `CertaintyGRPOTrainer`: it computes the weight of each token from the reference's logits, in JAX, and
multiplies TRL's KL of the token by it, whatever the `loss_type`. A weight carries no gradient, so autograd needs no
bridge. `JaxLoss` is the other way: the whole loss in JAX, its gradient passed back by DLPack; `check` compares both.
The rest of the file is a toy: a GPT-2 of two layers with random weights is rewarded for the letter e. Written for trl
1.16.0; not for PEFT adapters, with which TRL has no reference model of its own.
"""

import tempfile

import datasets
import jax
import jax.numpy as jnp
import tokenizers
import torch
import transformers
import trl

from critkl_jax import Batch, LossConfig, certainty, exponent_for, kl_weight, ppo_loss


def to_jax(x: torch.Tensor) -> jax.Array:
  """Passes a tensor to JAX without a copy; JAX and PyTorch must use the same kind of device."""
  return jnp.from_dlpack(x.detach().contiguous())


class TokenBeta(float):
  """The KL coefficient alpha with a weight for each token: TRL's `beta * per_token_kl` becomes alpha w_t KL_t."""

  def __new__(cls, beta: float, weight: torch.Tensor):
    """Makes the coefficient from alpha and the weights, float32 `[B, T]`."""
    self = super().__new__(cls, beta)
    self.weight = weight
    return self

  def __mul__(self, per_token_kl):
    return float(self) * self.weight * per_token_kl


class CertaintyGRPOTrainer(trl.GRPOTrainer):
  """A GRPOTrainer whose KL penalty is weighted by the certainty of the reference."""

  def __init__(self, *args, certainty_exponent: float = 150.0, **kwargs):
    super().__init__(*args, **kwargs)
    self.certainty_exponent = certainty_exponent

  @torch.no_grad()
  def _generate_and_score_completions(self, inputs):
    batch = super()._generate_and_score_completions(inputs)
    ref_logits = to_jax(completion_logits(self.ref_model, batch))
    batch['kl_weight'] = torch.from_dlpack(kl_weight(certainty(ref_logits), self.certainty_exponent))
    return batch

  def compute_loss(self, model, inputs, **options):
    weight, mask = inputs['kl_weight'], inputs['completion_mask']
    mean_weight = (weight * mask).sum() / mask.sum().clamp(min=1)
    self._metrics['train' if model.training else 'eval']['kl_weight'].append(mean_weight.item())
    beta, self.beta = self.beta, TokenBeta(self.beta, weight)
    try:
      return super().compute_loss(model, inputs, **options)
    finally:
      self.beta = beta


def completion_logits(model, batch) -> torch.Tensor:
  """Computes the logits `[B, T, V]` from which the tokens of the completions are drawn."""
  ids = torch.cat([batch['prompt_ids'], batch['completion_ids']], dim=1)
  mask = torch.cat([batch['prompt_mask'], batch['completion_mask']], dim=1)
  return model(input_ids=ids, attention_mask=mask).logits[:, -batch['completion_ids'].shape[1] - 1:-1]


class JaxLoss(torch.autograd.Function):
  """`critkl_jax.ppo_loss` as a PyTorch function of the policy's logits."""

  @staticmethod
  def forward(ctx, logits, ref_logits, batch: Batch, config: LossConfig):
    def loss_of(logits):
      return ppo_loss(logits, None, to_jax(ref_logits), batch, config)[0]

    loss, gradient = jax.value_and_grad(loss_of)(to_jax(logits))
    ctx.save_for_backward(torch.from_dlpack(gradient))
    return torch.from_dlpack(loss)

  @staticmethod
  def backward(ctx, grad_output):
    (gradient,) = ctx.saved_tensors
    return grad_output * gradient, None, None, None


def check(trainer: CertaintyGRPOTrainer) -> None:
  """Compares the trainer's loss of the latest batch, and its gradient, with `critkl_jax.ppo_loss`."""
  model, inputs = trainer.model, trainer._buffered_inputs[0]
  batch = Batch(actions=to_jax(inputs['completion_ids'].int()), mask=to_jax(inputs['completion_mask'].int()),
                log_probs=to_jax(inputs['old_per_token_logps']), advantages=to_jax(inputs['advantages']))
  config = LossConfig(kl_estimator='k3', clip_ratio=trainer.args.epsilon, temperature=trainer.temperature,
                      kl_coefficient=trainer.beta, certainty_exponent=trainer.certainty_exponent)
  with torch.no_grad():
    ref_logits = completion_logits(trainer.ref_model, inputs)
  loss = trainer.compute_loss(model, inputs)
  jax_loss = JaxLoss.apply(completion_logits(model, inputs), ref_logits, batch, config)
  gradients = (torch.autograd.grad(x, model.parameters()) for x in (loss, jax_loss))
  difference = max((a - b).abs().max() for a, b in zip(*gradients))
  print(f'TRL and JAX: loss_difference {(loss - jax_loss).abs():.1e}  gradient_difference {difference:.1e}')


# The toy: replace it with your model, tokenizer, prompts and reward.


def letters_tokenizer() -> transformers.PreTrainedTokenizerFast:
  """Makes a tokenizer whose tokens are lower-case letters, with `%` as padding and end."""
  words = {letter: i for i, letter in enumerate('%abcdefghijklmnopqrstuvwxyz')}
  tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token='%'))
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split('', 'isolated')
  tokenizer.decoder = tokenizers.decoders.Fuse()
  return transformers.PreTrainedTokenizerFast(
      tokenizer_object=tokenizer, pad_token='%', eos_token='%', padding_side='left')


def reward(completions, **_):
  """Rewards the share of the letter e in a completion."""
  return [text.count('e') / max(len(text), 1) for text in completions]


def main() -> None:
  """Trains four steps, two on each batch of completions, prints their metrics and checks the loss."""
  torch.manual_seed(0)
  tokenizer = letters_tokenizer()
  model = transformers.GPT2LMHeadModel(transformers.GPT2Config(
      vocab_size=len(tokenizer), n_positions=32, n_embd=32, n_layer=2, n_head=2, initializer_range=0.4,
      bos_token_id=0, eos_token_id=0, pad_token_id=0))
  with tempfile.TemporaryDirectory() as directory:
    model.save_pretrained(directory)
    config = trl.GRPOConfig(
        output_dir=directory, use_cpu=True, bf16=False, report_to=[], save_strategy='no', logging_steps=1,
        disable_tqdm=True, disable_dropout=True, per_device_train_batch_size=16, num_generations=4,
        max_completion_length=8, num_iterations=2, max_steps=4, learning_rate=1e-3, beta=0.1,
        use_bias_correction_kl=False)  # so that TRL's KL is the plain k3, which `check` can compute
    trainer = CertaintyGRPOTrainer(
        model=transformers.GPT2LMHeadModel.from_pretrained(directory),  # TRL loads the reference from the same place
        args=config, reward_funcs=reward, processing_class=tokenizer,
        train_dataset=datasets.Dataset.from_dict({'prompt': ['a', 'bc', 'def', 'ghij']}),
        certainty_exponent=exponent_for(1.0, len(tokenizer)))  # weight 1/2 where the reference's entropy is 1 nat
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()
    for row in trainer.state.log_history[:-1]:
      print(f'step {row["step"]}', *(f' {name} {row[name]:.4f}' for name in ('loss', 'kl', 'kl_weight')))
    check(trainer)


if __name__ == '__main__':
  main()
