"""Named configs, for `--preset`."""

from critkl_jax.models.architectures import ModelConfig
from critkl_jax.rl.loss_config import LossConfig
from critkl_jax.tasks.addition.config import AdditionFinetuning, AdditionPretraining
from critkl_jax.tasks.stories.config import StoriesFinetuning, StoriesPretraining
from critkl_jax.tasks.stories.text import WORDS
from critkl_jax.training.config import FinetuneConfig, PretrainConfig

# smoke, tiny and small keep the optimizer with which the shipped reference and the documented accuracies were made.
PRETRAIN_PRESETS = {
    'smoke': PretrainConfig(
        model=ModelConfig(context_length=384, num_layers=2, num_heads=2, width=32), addition=AdditionPretraining(1),
        batch_size=8, num_steps=4, warmup_steps=1, hidden_only=False, save_every=2, eval_problems=4),
    'tiny': PretrainConfig(hidden_only=False),
    'stories': PretrainConfig(
        task='stories', model=ModelConfig(vocab_size=len(WORDS), context_length=96, num_heads=4), batch_size=128,
        num_steps=1500, stories=StoriesPretraining(4)),
    'small': PretrainConfig(
        model=ModelConfig(context_length=1024, num_layers=6, num_heads=3, width=192), addition=AdditionPretraining(6),
        num_steps=1600, hidden_only=False),
    'paper': PretrainConfig(
        model=ModelConfig(context_length=1024, num_layers=12, num_heads=12, width=768, value_head='mlp'),
        addition=AdditionPretraining(7), batch_size=64, num_steps=20000, optimizer='adamw', learning_rate=6e-4,
        warmup_steps=1000, weight_decay=0.1, save_every=1000, eval_problems=1000),
    'gpt2': PretrainConfig(
        model=ModelConfig(vocab_size=50257, context_length=1024, num_layers=12, num_heads=12, width=768),
        addition=AdditionPretraining(7, pad_vocabulary=True), batch_size=64, num_steps=20000,
        optimizer='adamw', learning_rate=6e-4,
        warmup_steps=1000, weight_decay=0.1, save_every=1000, eval_problems=1000),
    'gpt2_xl': PretrainConfig(
        model=ModelConfig(vocab_size=50257, context_length=1024, num_layers=48, num_heads=25, width=1600),
        addition=AdditionPretraining(7, pad_vocabulary=True), batch_size=64, num_steps=20000,
        optimizer='adamw', learning_rate=2e-4,
        warmup_steps=1000, weight_decay=0.1, save_every=1000, eval_problems=1000),
}

FINETUNE_PRESETS = {
    'smoke': FinetuneConfig(num_iterations=2, episodes=4, minibatches=2, save_every=1, eval_problems=4),
    'tiny': FinetuneConfig(),
    'small': FinetuneConfig(num_iterations=30),
    'stories': FinetuneConfig(
        task='stories', stories=StoriesFinetuning(6), num_iterations=30, episodes=192, learning_rate=2e-4),
    # Section 5.3 of the paper: A2C with GAE and a critic, one pass over 50 episodes.
    'paper': FinetuneConfig(
        loss=LossConfig(algorithm='a2c', value_coefficient=0.1, entropy_coefficient=0.0005, kl_coefficient=5.0),
        num_iterations=100, episodes=50, minibatches=25, learning_rate=1e-6, advantage='gae', gae_lambda=0.95,
        value_head='mlp', eval_problems=1000),
    # The released code where it departs from the paper: temperatures, certainty, entropy coefficient, rewards.
    'released': FinetuneConfig(
        loss=LossConfig(algorithm='a2c', value_coefficient=0.1, entropy_coefficient=0.001, kl_coefficient=5.0,
                        temperature=2.0, certainty='min_entropy', certainty_temperature=4.0),
        num_iterations=100, episodes=50, minibatches=25, learning_rate=1e-6,
        addition=AdditionFinetuning(wrong_reward=-1.0), advantage='gae', gae_lambda=0.95, value_head='mlp',
        eval_problems=1000),
}
