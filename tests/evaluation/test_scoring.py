"""Scores are the model's own, and do not depend on how they are computed."""

import dataclasses

from example_configs import TINY_RUN
from flax import nnx
import generic_states
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mhc import config as config_lib
from mhc.data import tokenizer as tokenizer_lib
from mhc.evaluation import buckets
from mhc.evaluation import network as network_lib
from mhc.evaluation import scoring
from mhc.model import transformer
from mhc.training import evaluate
from mhc.training import generate
from mhc.training import step as step_lib

BYTES = tokenizer_lib.Bytes()
EXPERTS = config_lib.MoEConfig(
  num_experts=4, experts_per_token=2, expert_dim=8, num_dense_blocks=0
)


def functions(config, params, bias=None):
  """A network of these parameters, with the settings of inference."""
  config = generate.inference_config(config)
  graphdef, _ = transformer.abstract(config)
  return network_lib.of_model(nnx.merge(graphdef, nnx.State(params)), bias)


def random_network(config=TINY_RUN.model, bias=None):
  _, shapes = transformer.abstract(config)
  moved = generic_states.parameters(shapes, seed=3)
  return functions(config, jax.tree.map(jnp.asarray, moved), bias)


@pytest.fixture(scope='module')
def network():
  return random_network()


@pytest.fixture(scope='module')
def scorer(network):
  return scoring.Scorer(network, BYTES, max_length=24, batch_size=4)


def texts(number, least, most, seed=0):
  rng = np.random.default_rng(seed)
  return [
    rng.integers(0, 256, rng.integers(least, most + 1)).tolist()
    for _ in range(number)
  ]


def requests(number, seed=0):
  """Contexts that may be empty, and continuations."""
  both = texts(number, 0, 9, seed), texts(number, 1, 5, seed + 1)
  return list(zip(*both, strict=True))


def of_logits(logits, vocab_size=258):
  """A network that is a function of tokens [b, t]; it has no cache."""
  return network_lib.Network(
    vocab_size=vocab_size,
    params=None,
    logits=lambda _, tokens: logits(tokens),
    decode=lambda _, tokens, cache, start: (logits(tokens), cache),
    empty_cache=lambda batch_size, size: (),
  )


def test_log_likelihoods_are_the_nats_of_evaluate():
  """Of the same rows by the programs of training, experts and all."""
  model = dataclasses.replace(
    TINY_RUN.model,
    moe=dataclasses.replace(EXPERTS, dispatch='dropless'),
  )
  config = dataclasses.replace(
    TINY_RUN, model=model, mesh=config_lib.MeshConfig(num_devices=1)
  )
  programs = step_lib.build(config)
  state = generic_states.state(programs)
  rows = np.random.default_rng(1).integers(0, 258, (3, 17)).astype(np.int32)
  rows[:, 0] = BYTES.start
  nats = evaluate.row_nats(programs, state, rows, 4)
  assert nats.std() > 0.1
  there = functions(model, state.params, state.router_bias)
  scorer = scoring.Scorer(there, BYTES, max_length=16, batch_size=2)
  pairs = [(row[:1], row[1:]) for row in rows]
  found = np.array([score for score, _ in scorer.log_likelihoods(pairs)])
  np.testing.assert_allclose(-found, nats, rtol=0, atol=1e-4)
  # The start token is what an empty context and a whole text begin with.
  empty = scorer.log_likelihoods([((), row[1:]) for row in rows])
  assert [score for score, _ in empty] == found.tolist()
  assert scorer.rolling([row[1:] for row in rows]) == found.tolist()
  assert scorer.truncated == scoring.Truncated()


def test_order_batch_and_padding_do_not_matter(network, scorer):
  pairs = requests(11)
  found = scorer.log_likelihoods(pairs)
  order = np.random.default_rng(2).permutation(11)
  mixed = scorer.log_likelihoods([pairs[number] for number in order])
  assert [found[number] for number in order] == mixed
  assert scorer.log_likelihoods(pairs[3:4]) == found[3:4]
  # Other batches, of 3 rows of 13 tokens in place of 4 rows of 16.
  tight = scoring.Scorer(network, BYTES, max_length=13, batch_size=3)
  assert max(len(one) + len(two) for one, two in pairs) > 10
  for one, two in zip(found, tight.log_likelihoods(pairs), strict=True):
    np.testing.assert_allclose(one[0], two[0], rtol=1e-6)
    assert one[1] == two[1]
  assert tight.truncated == scoring.Truncated()


def test_cached_generation_is_greedy_decoding_of_whole_rows():
  config = dataclasses.replace(TINY_RUN.model.plain, moe=EXPERTS)
  network = random_network(config, jnp.linspace(-0.2, 0.2, 4)[None])
  scorer = scoring.Scorer(network, BYTES, max_length=24, batch_size=3)
  contexts = [*texts(4, 7, 12, seed=5), []]
  found = scorer.generate(contexts, max_tokens=10)
  logits = jax.jit(network.logits)
  for context, text in zip(contexts, found, strict=True):
    row, new = np.zeros((3, 24), np.int32), []
    context = context or [BYTES.start]
    row[:, : len(context)] = context
    for end in range(len(context), len(context) + 10):
      row[:, end] = np.argmax(logits(network.params, row)[0, end - 1])
      new.append(int(row[0, end]))
    stops = [*new, BYTES.stop].index(BYTES.stop)
    assert text == bytes(n for n in new[:stops] if n < 256).decode(
      errors='replace'
    )
  assert found == scorer.generate(contexts[::-1], max_tokens=10)[::-1]


def test_generation_stops():
  """A network that counts up says where a text ends."""

  def follow(tokens):
    return 9.0 * jax.nn.one_hot((tokens + 1) % 258, 258, dtype=jnp.float32)

  scorer = scoring.Scorer(of_logits(follow), BYTES, max_length=80, batch_size=2)
  contexts = [list(text) for text in (b'a', b'xyzd', b'..Q')]
  assert scorer.generate(contexts, max_tokens=3) == ['bcd', 'efg', 'RST']
  stopped = scorer.generate(contexts, ['def', 'i', 'h'], max_tokens=20)
  assert stopped[:2] == ['bc', 'efg']
  assert scorer.generate([[254]], max_tokens=9) == ['�']  # then the mark
  # The last of a text's tokens may stand where the room ends.
  full = scorer.generate([[65] * 41], max_tokens=40)
  assert full == [bytes(range(66, 106)).decode()]
  assert scorer.truncated == scoring.Truncated()
  (short,) = scorer.generate([[64] * 50], max_tokens=100)
  assert len(short) == 40
  assert scorer.truncated == scoring.Truncated(1, 9, 1)
  record = scorer.record()
  assert record['requests'] == 9
  assert record['seconds'] > 0
  assert record['truncated'] == {'requests': 1, 'tokens': 9, 'limited': 1}


def test_draws_depend_on_the_seed_and_the_number_of_a_request_alone():
  uniform = of_logits(lambda tokens: jnp.zeros((*tokens.shape, 258)))
  scorer = scoring.Scorer(uniform, BYTES, max_length=24, batch_size=3)
  options = {'max_tokens': 10, 'temperature': 1.0}
  drawn = scorer.generate([[1], [2] * 9, [3], [4]], **options, seed=1)
  assert len({*drawn}) == 4
  other = scorer.generate([[1], [2] * 9, [3], [4]], **options, seed=2)
  assert not {*drawn} & {*other}
  alone = scoring.Scorer(uniform, BYTES, max_length=24, batch_size=1)
  assert drawn == alone.generate([[1], [2] * 9, [3], [4]], **options, seed=1)


def test_what_does_not_fit_is_counted(network):
  scorer = scoring.Scorer(network, BYTES, max_length=8, batch_size=4)
  context, continuation = texts(2, 10, 10)
  cut = scorer.log_likelihoods([(context, continuation[:3])])
  assert scorer.truncated == scoring.Truncated(1, 4, 0)
  assert cut == scorer.log_likelihoods([(context[4:], continuation[:3])])
  assert scorer.truncated == scoring.Truncated(1, 4, 0)
  # A continuation that is too long is read in windows.
  ((whole, _),) = scorer.log_likelihoods([(context[-1:], continuation)])
  parts = scorer.log_likelihoods(
    [
      (context[-1:], continuation[:8]),
      (continuation[1:8], continuation[8:]),
    ]
  )
  np.testing.assert_allclose(whole, sum(score for score, _ in parts), rtol=1e-6)


def test_windows_are_those_of_the_harness():
  """The example in the docstring of lm_eval's `loglikelihood_rolling`."""
  found = [
    (row[:-1], row[first:])
    for row, first in scoring.windows([-1], range(10), 4)
  ]
  assert found == [
    ([-1, 0, 1, 2], [0, 1, 2, 3]),
    ([3, 4, 5, 6], [4, 5, 6, 7]),
    ([5, 6, 7, 8], [8, 9]),
  ]
  assert not list(scoring.windows([-1], [], 4))


def accuracy(network, answers):
  """Four choices each, of which the scorer takes the most likely."""
  scorer = scoring.Scorer(network, BYTES, max_length=16, batch_size=64)
  pairs = [([answer], [c]) for answer in answers for c in range(4)]
  scores = [score for score, _ in scorer.log_likelihoods(pairs)]
  # Among equals any, as a guesser does.
  rng = np.random.default_rng(0)
  scores = np.reshape(scores, (-1, 4)) + 1e-9 * rng.normal(size=(400, 4))
  return np.mean(np.argmax(scores, axis=1) == answers)


def test_a_copy_is_right_and_a_uniform_network_guesses():
  answers = np.random.default_rng(1).integers(0, 4, 400).tolist()
  copy = of_logits(
    lambda tokens: 9.0 * jax.nn.one_hot(tokens, 258, dtype=jnp.float32)
  )
  assert accuracy(copy, answers) == 1
  scorer = scoring.Scorer(copy, BYTES, max_length=16, batch_size=2)
  ((_, same), (_, other)) = scorer.log_likelihoods(
    [([7], [7, 7]), ([7], [7, 8])]
  )
  assert (same, other) == (True, False)
  uniform = of_logits(lambda tokens: jnp.zeros((*tokens.shape, 258)))
  error = np.sqrt(0.25 * 0.75 / 400)
  assert abs(accuracy(uniform, answers) - 0.25) < 2 * error
  scorer = scoring.Scorer(uniform, BYTES, max_length=16, batch_size=2)
  np.testing.assert_allclose(
    scorer.rolling([[1] * 40, []]), [-40 * np.log(258), 0], rtol=1e-6
  )


def test_bad_input_is_named(network, scorer):
  def make(**changes):
    scoring.Scorer(
      network, BYTES, **{'max_length': 8, 'batch_size': 1, **changes}
    )

  for call, message in (
    (lambda: make(max_length=1), 'max_length=1 must be at least 2'),
    (lambda: make(batch_size=0), 'batch_size=0 must be at least 1'),
    (
      lambda: scoring.Scorer(
        of_logits(None, 200), BYTES, max_length=8, batch_size=1
      ),
      'has 258 tokens, the model 200',
    ),
    (
      lambda: scorer.log_likelihoods([([1], [2]), ([1], [])]),
      'continuation of request 1 is empty',
    ),
    (
      lambda: scorer.log_likelihoods([([1, 999], [2])]),
      'context of request 0 has token 999, outside of the vocabulary of 320',
    ),
    (lambda: scorer.rolling([[3, -1]]), 'text 0 has token -1'),
    (lambda: scorer.generate([[1]], max_tokens=0), 'max_tokens=0'),
    (lambda: scorer.generate([[1]], [''], max_tokens=1), "stop string is ''"),
    (
      lambda: scorer.generate([[1]], max_tokens=1, temperature=-1.0),
      r'temperature=-1\.0',
    ),
    (
      lambda: scorer.generate([[1]], max_tokens=1, top_p=0.0),
      r'top_p=0\.0',
    ),
  ):
    with pytest.raises(ValueError, match=message):
      call()


def test_buckets_are_few():
  found = {buckets.length(tokens, 1000) for tokens in range(1, 1001)}
  sizes = {16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1000}
  assert found == sizes
  lengths = [5, 700, 16, 17, 20]
  (first, second, third) = buckets.batches(lengths, 1000, 2)
  assert (first, second, third) == (
    (768, [1]),
    (24, [4, 3]),
    (16, [2, 0]),
  )
