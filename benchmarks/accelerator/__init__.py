"""Checks correctness, memory and speed of the project on a real GPU or TPU, in one command and a few minutes.

    PYTHONPATH=. python -m benchmarks.accelerator --minutes=8 --json=accelerator.json
    PYTHONPATH=. JAX_PLATFORMS=cpu python -m benchmarks.accelerator --preset=smoke --json=smoke.json    # to try it

Run it from the checkout. It needs jax with the device's plugin, flax, optax, chex, orbax-checkpoint, scipy, matplotlib,
tqdm and absl-py, and uses PyTorch and transformers if they are installed. Nothing is downloaded.

Each part runs in its own process, in the order of the table in `__main__`. The table also holds each part's share of
the minutes; time that a part leaves goes to the next one. At its limit a part is stopped with all its processes. The
JSON file is rewritten after each part; a part that failed or was stopped keeps the rows that it had finished and the
last lines that it printed. `--part=paper` runs one part again (this flag may be repeated) and keeps the others in the
file. Compiled programs are cached in `JSON.cache` next to the file; delete it to measure times of compilation. The exit
status is 1 if a part failed or was stopped.

The rows (names end in the unit; null is a number that is not finite or that the backend does not report):

- `device`: kind, versions and driver. `matrix_product`: FLOP/s of a large product of random matrices; `float32` rounds
  factors as the backend does by default (to TF32 on GPUs, to bfloat16 on TPUs), `float32_highest` does not. `copy`:
  bytes read and written by x + 1. `latency`: seconds of a finished call, and of a round of a loop on the device, the
  least that each token of a cached rollout takes.
- `operation`: `error TYPE (tokens, width, vocabulary) IMPLEMENTATION` is the largest error of values and gradients
  against float64, relative to the largest entry, and whether it is as small as that of plain JAX (`plain`).
  `N= D= V= PROGRAM` (tokens, width, vocabulary) times forward and backward of one loss in bfloat16: `temporary_mib` in
  the compiled program's plan, `seconds` (median of 5), `tera_flops_per_second` of its matrix products, recomputation
  included, and `process_peak_mib`, the most that the process has held so far, which checks the plan in rows where it
  rises. `naive` holds all logits; running out of memory is no failure there. On a CPU the kernels are interpreted.
- `rollouts`: response tokens per second, medians of 3, one token at a time (`cached`), with drafted windows
  (`speculative`), and in a teacher-forced pass (`teacher_forced`). `sequential_steps` are calls of the model.
- `generate`: Hugging Face `generate` and a forward pass in PyTorch with the same weights; `agreement` is the largest
  difference of the two models' log-probabilities. On a CPU a few episodes only.
- `train_step`: seconds of each part of an iteration, its `share` of their sum, and the `fraction` of the bfloat16
  FLOP/s of `device` that it reaches, counting FLOP of real tokens only. `whole` is the one program of all parts.
- `finetune`: the default command, from start to end, with its accuracies at N and N + 1 digits.
- `paper`: pre-training of 85 M parameters at N = 7 until 2 minutes before the end, or until 97 % of the answers at N
  are right; then PPO on N + 1 under the three penalties, as one population; `curves` has the accuracy and the KL of
  each iteration, `after` the accuracies of greedy answers.

`compilation` rows are wall seconds of programs compiled in parallel threads, tracing included. Blocks of the `paper`
size are a loop (`scan_layers`), which compiles as fast as one block.
"""
