"""Proves or disproves the project on a real GPU or TPU, in one command and a few minutes.

    PYTHONPATH=. python -m benchmarks.accelerator --minutes=8 --json=accelerator.json
    PYTHONPATH=. JAX_PLATFORMS=cpu python -m benchmarks.accelerator --preset=smoke --json=smoke.json    # to try it

Run it from the checkout; nothing needs to be installed but jax with its plugin for the device, flax, optax, chex,
orbax-checkpoint, scipy, matplotlib, tqdm and absl-py. PyTorch and transformers are used where they are there. Nothing
is fetched.

Each part runs in a process of its own, in the order of the table at the top of `__main__`, which also says how the
minutes are shared out: a part has its share and all that earlier ones have left. At its limit it is stopped with all
its processes. The JSON file is written anew after each part; a part that failed or was stopped keeps the rows that it
had finished and the last lines that it printed. `--part=paper` runs one part again (this flag may be repeated) and
keeps the others in the file. Compiled programs are kept in `JSON.cache` beside the file, so a second run compiles
little; for times of compilation, start without it. The exit status is 1 if a part failed or was stopped.

What the rows mean (names end in the unit; null is a number that is not finite or that the backend does not tell):

- `device`: kind, versions and driver. `matrix_product`: rates of a large product of random matrices; `float32` rounds
  factors as the backend does by default (to TF32 on GPUs, to bfloat16 on TPUs), `float32_highest` does not. `copy`:
  bytes read and written by x + 1. `latency`: of a call that is waited for, and of a round of a loop on the device,
  which each token of a cached rollout takes at least.
- `operation`: `error TYPE (N, D, V) IMPLEMENTATION` gives the largest error of the record's values and of the gradients
  against float64, relative to the largest entry, and whether it agrees with that of plain JAX (`reference`).
  `N= D= V= PROGRAM` gives forward and backward of one loss in bfloat16: `temporary_mib` that the compiled program plans
  with, `seconds` (median of 5), `tera_flops_per_second` of the products that the program makes, recomputation included,
  and `process_peak_mib`, the most that the process has held so far: a check of the plan, for the rows in which it
  rises. `naive` holds all logits and may run out of memory, which is no failure. On a CPU the kernels are interpreted.
- `rollouts`: tokens of responses per second, medians of 3, by one token at a time (`cached`) and by drafted windows
  (`speculative`), and the same tokens read in one pass (`teacher_forced`). `sequential_steps` are calls of the model.
- `generate`: Hugging Face `generate` and a forward pass in PyTorch with the same weights; `agreement` is how far apart
  the two models' log-probabilities are. On a CPU a few episodes only.
- `train_step`: seconds of each part of an iteration, its `share` of their sum, and the `fraction` of the bfloat16 rate
  of `device` that it reaches, with the FLOP that the mathematics needs. `whole` is the one program of all parts.
- `finetune`: the default command, from its start to its end, with its accuracies at N and N + 1 digits.
- `paper`: pre-training of 85 M parameters at N = 7 until 2 minutes before the end, or until 97 % of the answers at N
  are right; then PPO on N + 1 under the three penalties, as one population; `curves` has the accuracy and the
  divergence of each iteration, `after` those of greedy answers.

`compilation` rows are wall seconds of programs that were compiled side by side in threads, tracing included. Blocks of
the `paper` size are a loop (`scan_layers`), which compiles as fast as one block.
"""
