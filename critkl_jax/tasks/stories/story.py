"""Stories as arrays: who goes where, who takes and gives what; and a question that the story answers.

Letters: M facts at most, P persons, O objects, R places of the vocabulary.
"""

import chex
import jax
import jax.numpy as jnp
from flax import struct

PERSONS, PLACES, OBJECTS = 8, 8, 6
CAST, THINGS = 3, 2  # persons and objects in one story, so that its facts have to do with each other
GO, TAKE, GIVE = range(3)
_OF_OBJECTS, _QUESTION_OF_OBJECT = 0.6, 0.75  # probability of a fact, and of a question, about an object
_NONE = -1


@struct.dataclass
class Story:
  """A story and a question about it.

  Attributes:
    kinds: int32 `[M]` `GO`, `TAKE` or `GIVE`.
    actors: int32 `[M]` person that goes, takes or gives.
    things: int32 `[M]` place to which the person goes, or object.
    receivers: int32 `[M]` person that gets the object; the actor itself where nothing is given.
    length: int32 `[]` number of facts, 1..M; later entries mean nothing.
    asks_object: bool `[]` whether the question is where an object is, or where a person is.
    asked: int32 `[]` the object or the person.
    wants_facts: bool `[]` whether the response is the facts that show where it is, or these and the place.
  """

  kinds: chex.Array
  actors: chex.Array
  things: chex.Array
  receivers: chex.Array
  length: chex.Array
  asks_object: chex.Array
  asked: chex.Array
  wants_facts: chex.Array


def sample_story(key: chex.PRNGKey, length: chex.Numeric, most: int, wants_facts: chex.Numeric = False) -> Story:
  """Draws a story.

  The first fact is that somebody goes somewhere. A later fact is about an object with probability 0.6: a person takes
  it if nobody has it, else its holder gives it to another; otherwise a person goes to another place. With probability
  0.75 the question is about an object whose holder's place is known; otherwise, or if there is none, about a person
  whose place is known.

  Args:
    key: PRNG key, consumed.
    length: number of facts, 1..most.
    most: M.
    wants_facts: whether the facts are asked for.
  """
  cast_key, things_key, fact_key, question_key = jax.random.split(key, 4)
  cast = jax.random.permutation(cast_key, jnp.arange(PERSONS, dtype=jnp.int32))[:CAST]
  own = jax.random.permutation(things_key, jnp.arange(OBJECTS, dtype=jnp.int32))[:THINGS]
  length = jnp.asarray(length, jnp.int32)

  def fact(state, i):
    where, holder = state
    keys = jax.random.split(jax.random.fold_in(fact_key, i), 5)
    thing = own[_draw(keys[0], THINGS)]
    of_object = (i > 0) & jax.random.bernoulli(keys[1], jnp.float32(_OF_OBJECTS))
    giver = holder[thing]
    kind = jnp.where(of_object, jnp.where(giver == _NONE, TAKE, GIVE), GO).astype(jnp.int32)
    person = cast[_draw(keys[2], CAST)]
    actor = jnp.where(kind == GIVE, giver, person)
    step = 1 + _draw(keys[3], CAST - 1)  # to another of the cast
    receiver = jnp.where(kind == GIVE, cast[(jnp.argmax(cast == giver) + step) % CAST], actor).astype(jnp.int32)
    place = jnp.where(where[actor] == _NONE, _draw(keys[4], PLACES),
                      (where[actor] + 1 + _draw(keys[4], PLACES - 1)) % PLACES).astype(jnp.int32)
    counts = i < length
    where = jnp.where(counts & (kind == GO), where.at[actor].set(place), where)
    holder = jnp.where(counts & (kind != GO), holder.at[thing].set(receiver), holder)
    return (where, holder), (kind, actor, jnp.where(kind == GO, place, thing), receiver)

  start = (jnp.full(PERSONS, _NONE, jnp.int32), jnp.full(OBJECTS, _NONE, jnp.int32))
  (where, holder), facts = jax.lax.scan(fact, start, jnp.arange(most, dtype=jnp.int32))
  return Story(*facts, length, *_sample_question(question_key, where, holder), jnp.asarray(wants_facts, bool))


def _sample_question(key, where, holder):
  """Draws a question: whether it is about an object, and the object or the person."""
  kind_key, which_key = jax.random.split(key)
  found = (holder != _NONE) & (where[holder] != _NONE)
  asks_object = jnp.any(found) & jax.random.bernoulli(kind_key, jnp.float32(_QUESTION_OF_OBJECT))
  asked = jnp.where(asks_object, _one_of(which_key, found), _one_of(which_key, where != _NONE))
  return asks_object, asked.astype(jnp.int32)


def chain_of(story: Story) -> tuple[chex.Array, chex.Array, chex.Array]:
  """Finds the facts that answer the question.

  Returns:
    bool `[M]`, which facts are about the changes of hands of the object, in the order of the story; the index int32
    `[]` of the fact by which the person, or the last holder of the object, got to the place; and this place int32 `[]`.
  """
  index = jnp.arange(story.kinds.shape[0], dtype=jnp.int32)
  real = index < story.length
  handed = real & (story.kinds != GO) & (story.things == story.asked) & story.asks_object
  person = jnp.where(story.asks_object, story.receivers[jnp.max(jnp.where(handed, index, 0))], story.asked)
  last = jnp.max(jnp.where(real & (story.kinds == GO) & (story.actors == person), index, 0))
  return handed, last, story.things[last]


# Types are explicit: JAX's defaults depend on `jax_enable_x64`, and another type would draw other stories.


def _draw(key, number):
  return jax.random.randint(key, (), 0, number, dtype=jnp.int32)


def _one_of(key, flags):
  """Draws the index of one of the true flags."""
  return jnp.argmax(jnp.where(flags, jax.random.uniform(key, flags.shape, jnp.float32), -1.0))
