"""The package keeps the order that its structure promises."""

import ast
import graphlib
import pathlib
import subprocess
import sys

import pytest

import critkl_jax

PACKAGE = pathlib.Path(critkl_jax.__file__).parent
# Data flow one way: a module imports only from its own package and from those before it.
ORDER = ('config', 'pytree', 'records', 'sharding', 'rl', 'ops', 'models', 'tasks', 'sampling', 'training', 'runtime',
         'analysis', 'studies')
TOGETHER = {'rl', 'ops'}  # a loss takes the fused operation, which takes the certainty


def module_name(path):
  return '.'.join(path.relative_to(PACKAGE).with_suffix('').parts)


def imports_of(path):
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.ImportFrom):
      assert node.level == 0, f'{path.name}: relative imports hide where data come from'
    if isinstance(node, ast.Import):
      assert not any(alias.name.startswith('critkl_jax') for alias in node.names), path.name
    if isinstance(node, ast.ImportFrom) and node.module and node.module.split('.')[0] == 'critkl_jax':
      base = node.module.removeprefix('critkl_jax').lstrip('.')
      yield from (f'{base}.{alias.name}'.lstrip('.') for alias in node.names)


MODULES = {module_name(path): path for path in PACKAGE.rglob('*.py') if path.name != '__init__.py'}


def package_of(name):
  return name.split('.')[0]


def test_every_module_has_its_place():
  assert {package_of(name) for name in MODULES} == set(ORDER)


@pytest.mark.parametrize('name', MODULES)
def test_imports_flow_one_way(name):
  own = ORDER.index(package_of(name))
  for imported in imports_of(MODULES[name]):
    other = ORDER.index(package_of(imported))
    assert other <= own or {ORDER[other], ORDER[own]} <= TOGETHER, f'{name} imports {imported}'


def test_only_models_know_an_architecture():
  """No other module names GPT-2's module, a path of its parameters or a field of its cache."""
  private = {'models.gpt2', 'models.kv_cache', 'models.attention'}
  paths = {'wte', 'wpe', 'ln_f', 'h_', 'c_attn', 'c_fc', 'c_proj'}
  for name, path in MODULES.items():
    if package_of(name) == 'models':
      continue
    assert not private & {found.rpartition('.')[0] for found in imports_of(path)}, name
    for node in ast.walk(ast.parse(path.read_text())):
      if isinstance(node, ast.Constant) and isinstance(node.value, str):
        assert node.value not in paths, f'{name}:{node.lineno}: {node.value!r}'


def test_modules_do_not_import_each_other():
  graph = {name: {other for found in imports_of(path) for other in (found, found.rpartition('.')[0])
                  if other in MODULES} for name, path in MODULES.items()}
  list(graphlib.TopologicalSorter(graph).static_order())


def test_analysis_needs_no_trainer():
  for name, path in MODULES.items():
    if name.startswith('analysis'):
      assert not {'runtime.loop', 'training.train_step', 'training.pretrain_step'} & {
          found.rpartition('.')[0] for found in imports_of(path)}


def test_public_names_are_there_described_and_hide_no_module():
  assert len(set(critkl_jax.__all__)) == len(critkl_jax.__all__)
  for name in critkl_jax.__all__:
    assert getattr(critkl_jax, name).__doc__, name
    assert name not in ORDER
  wanted = {'certainty', 'kl_weight', 'token_kl', 'gae', 'ppo_loss', 'ppo_loss_jit', 'GPT2', 'generate',
            'make_train_step', 'load_checkpoint', 'weighted_kl', 'linear_weighted_kl'}
  assert wanted <= set(critkl_jax.__all__)


def test_public_functions_have_docstrings():
  for path in MODULES.values():
    for node in ast.parse(path.read_text()).body:
      if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith('_'):
        assert ast.get_docstring(node), f'{path.name}: {node.name}'


def test_the_homes_of_public_names_are_those_that_type_checkers_see():
  (block,) = (node for node in ast.parse((PACKAGE / '__init__.py').read_text()).body if isinstance(node, ast.If))
  seen = {alias.asname or alias.name: node.module.removeprefix('critkl_jax.')
          for node in block.body for alias in node.names}
  assert seen == critkl_jax._HOMES
  assert sorted(seen) == sorted(critkl_jax.__all__)
  assert set(critkl_jax.__all__) <= set(dir(critkl_jax))
  with pytest.raises(AttributeError, match="module 'critkl_jax' has no attribute 'ppo_los'"):
    critkl_jax.ppo_los  # noqa: B018
  with pytest.raises(ImportError, match="cannot import name 'ppo_los'"):
    from critkl_jax import ppo_los  # noqa: F401


TRAINS, SAVES, DRAWS = {'optax'}, {'orbax', 'tensorstore'}, {'matplotlib', 'tqdm', 'scipy'}
KERNELS = {'jax.experimental.pallas'}
FRAMEWORKS = {'jax', 'flax', 'chex'}


@pytest.mark.parametrize(('statement', 'absent'), [
    ('import critkl_jax', TRAINS | SAVES | DRAWS | KERNELS | FRAMEWORKS),
    ('from critkl_jax import certainty, ppo_loss, gae, linear_weighted_kl', TRAINS | SAVES | DRAWS | KERNELS),
    ('from critkl_jax import GPT2, generate, plus_task, oracle', TRAINS | SAVES | DRAWS | KERNELS),
    ('from critkl_jax import init_finetuning, make_train_step', SAVES | DRAWS | KERNELS),
    ('from critkl_jax import *', DRAWS | KERNELS),
])
def test_only_what_is_used_is_imported_and_no_device_is_started(statement, absent):
  """Modules are named, no time is taken: what is absent cannot take any."""
  code = (f"import sys; {statement}; print(*sys.modules); from jax._src import xla_bridge; "
          'assert not xla_bridge.backends_are_initialized()')
  out = subprocess.run([sys.executable, '-c', code], check=True, capture_output=True, text=True).stdout.split()
  assert not absent & set(out)
  assert ('critkl_jax.runtime.checkpoint' in out) == ('*' in statement)


def test_names_may_be_asked_for_while_a_program_is_traced():
  """A module that computed an array when it is imported would keep a tracer."""
  code = ('import sys, jax, critkl_jax; '
          'f = jax.jit(lambda x: [getattr(critkl_jax, name) for name in critkl_jax.__all__] and x); f(1.0); '
          'found = [(m, n) for m in list(sys.modules) if m.startswith("critkl_jax") for n, v in '
          'vars(sys.modules[m]).items() if isinstance(v, jax.core.Tracer)]; assert not found, found')
  subprocess.run([sys.executable, '-c', code], check=True)


def test_json_is_written_strictly():
  """Strict parsers refuse NaN: `storage` writes null for it, and whatever else makes JSON raises."""
  for path in [*MODULES.values(), *(PACKAGE.parent / 'experiments').glob('*.py'),
               *(PACKAGE.parent / 'benchmarks').rglob('*.py')]:
    for node in ast.walk(ast.parse(path.read_text())):
      if isinstance(node, ast.Call) and ast.unparse(node.func) in ('json.dump', 'json.dumps', 'dumps', 'dump'):
        strict = [word for word in node.keywords if word.arg == 'allow_nan' and ast.unparse(word.value) == 'False']
        assert strict, f'{path}:{node.lineno}: take storage.write_json or storage.to_json'
