"""Decoding against hand-worked answers, an uncached loop and a recursive depth-first search, with models small enough to read."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tinyonn_jax.arc import generate, tokens
from tinyonn_jax.arc.batches import Prompts
from tinyonn_jax.arc.tokens import END, ROW, SEP, START, VOCAB

STATES = 97


def _code(tokens, positions, task, dihedral):
    """A number for each token, in which everything the model is told takes part."""
    return tokens + 14 * positions[..., 0] + 51 * positions[..., 1] + 130 * positions[..., 2] + 7 * task + 11 * dihedral


def _hashing(counter=None):
    """A model whose logits are `params[hash of every visible token and its slot]`; its cache holds the tokens seen."""

    def decode(params, cache, tokens, positions, start, prefix, task, dihedral):
        if counter is not None:
            counter.append(tokens.shape)
        code = _code(tokens, positions, task[:, None], dihedral[:, None])
        seen = jax.vmap(lambda row, new, at: jax.lax.dynamic_update_slice(row, new, (at,)))(cache["seen"][0], code, start)
        slot = jnp.arange(seen.shape[1])
        own = start[:, None] + jnp.arange(tokens.shape[1])
        visible = (slot <= own[..., None]) | (slot < prefix[:, None, None])
        state = jnp.sum(jnp.where(visible, seen[:, None] * (slot + 1), 0), -1) % STATES
        return params[state], {"seen": seen[None]}

    return generate.Decoder(lambda batch, length: {"seen": jnp.zeros((1, batch, length), jnp.int32)}, decode)


HASHING = _hashing()


def _logprobs(params, sequence, positions, task, dihedral):
    """The same model without a cache or JAX: log-probabilities of what follows a sequence."""
    code = _code(np.array(sequence), np.array(positions), task, dihedral)
    logits = np.asarray(params, np.float64)[int(np.sum(code * (np.arange(len(code)) + 1))) % STATES]
    return logits - np.log(np.sum(np.exp(logits)))


def _next_position(answer, z):
    """Where the token after these answer tokens stands, from the definition."""
    rows = answer.count(ROW)
    x = len(answer) if rows == 0 else answer[::-1].index(ROW)
    return [x, rows, z]


def _step(params, prompt, answer, task, dihedral):
    z = int(prompt.positions[-1, 2])
    positions = prompt.positions.tolist()
    for i, token in enumerate(answer):
        positions.append([0, 0, z + 2] if token == END else _next_position(answer[:i], z + 1))
    return _logprobs(params, [*prompt.tokens.tolist(), *answer], positions, task, dihedral)


def _depth_first(params, prompt, task, dihedral, cap, least, answer=(), logprob=0.0):
    """Log-probabilities of all completions at or above `least`, and of all prefixes met."""
    found, met = {}, []
    for token, gain in enumerate(_step(params, prompt, list(answer), task, dihedral)):
        total = logprob + gain
        met.append(total)
        if total < least:
            continue
        longer = (*answer, token)
        if token == END:
            found[longer] = total
        elif len(longer) < cap:
            more, others = _depth_first(params, prompt, task, dihedral, cap, least, longer, total)
            found |= more
            met += others
    return found, met


def _prompts(encoded, task, dihedral, length=None):
    length = length or max(len(e.tokens) for e in encoded)
    pad = [(0, length - len(e.tokens)) for e in encoded]
    return Prompts(
        tokens=np.stack([np.pad(e.tokens.astype(np.int32), p, constant_values=END) for e, p in zip(encoded, pad, strict=True)]),
        positions=np.stack([np.pad(e.positions.astype(np.int32), (p, (0, 0))) for e, p in zip(encoded, pad, strict=True)]),
        prefix=np.array([e.prefix for e in encoded], np.int32),
        task=np.array(task, np.int32),
        dihedral=np.array(dihedral, np.int32),
    )


GRIDS = [np.array(g, np.int8) for g in ([[1]], [[2, 0]], [[3], [4]], [[5, 5, 5], [6, 7, 8]])]
ENCODED = [
    tokens.encode([], GRIDS[0]),
    tokens.encode([], GRIDS[1]),
    tokens.encode([(GRIDS[0], GRIDS[1])], GRIDS[2]),  # a context sequence: z is 5 higher
    tokens.encode([], GRIDS[3]),
]
PROMPTS = _prompts(ENCODED, [0, 1, -1, 5], [0, 3, 0, 7])


def _params(seed, scale=3.0):
    return np.random.default_rng(seed).normal(0, scale, (STATES, VOCAB)).astype(np.float32)


def test_prompts_are_what_the_hand_says():
    assert PROMPTS.tokens[1].tolist()[:5] == [START, 2, 0, ROW, SEP]
    assert PROMPTS.prefix.tolist() == [4, 5, 14, 10]


def greedy(decoder, params, prompts, cap, batch=4):
    """The answers in the order of the prompts, each of which is given once."""
    return _in_order(generate.greedy(decoder, params, _ask(prompts), len(prompts.tokens), cap, batch), len(prompts.tokens))


def search(decoder, params, prompts, cap, least, batch=4):
    """Likewise of the search."""
    count = len(prompts.tokens)
    return _in_order(generate.search(decoder, params, _ask(prompts), count, cap, least, batch), count)


def _ask(prompts):
    return lambda numbers: jax.tree.map(lambda a: a[np.array(numbers)], prompts)


def _in_order(found, count):
    parts = list(found)
    numbers = np.concatenate([numbers for numbers, _ in parts])
    assert sorted(numbers) == list(range(count))
    return jax.tree.map(lambda *a: np.concatenate(a)[np.argsort(numbers)], *(found for _, found in parts))


@pytest.mark.parametrize("batch", [1, 4, 6, 64])
def test_greedy_equals_an_uncached_loop(batch):
    """Whatever is decoded side by side; rows of a batch are read into again when their answers, of many lengths, are complete."""
    params = _params(batch)
    params[:, END] += 2
    cap, count = 9, 19
    encoded = [ENCODED[i % 4] for i in range(count)]
    prompts = _prompts(encoded, [i % 7 - 1 for i in range(count)], [i % 8 for i in range(count)], 20)
    found = greedy(HASHING, params, prompts, cap, batch)
    for row, prompt in enumerate(encoded):
        answer, total = [], 0.0
        while END not in answer and len(answer) < cap:
            logprobs = _step(params, prompt, answer, int(prompts.task[row]), int(prompts.dihedral[row]))
            answer.append(int(np.argmax(logprobs)))
            total += float(np.max(logprobs))
        assert found.tokens[row].tolist() == answer + [END] * (cap - len(answer))
        assert int(found.length[row]) == len(answer)
        assert bool(found.finished[row]) == (END in answer)
        np.testing.assert_allclose(found.logprob[row], total, rtol=1e-5, atol=1e-5)
    assert len(set(found.length.tolist())) > 4


# A model that says `params[task]`, a [steps, V] table of logits, one row a token, and shows the positions it was fed.
def _scripted(shown):
    def decode(params, cache, tokens, positions, start, prefix, task, dihedral):
        if tokens.shape[1] == 1:
            jax.debug.callback(lambda p: shown.append(p[:, 0].tolist()), positions, ordered=True)
        step = jnp.clip(start[:, None] + jnp.arange(tokens.shape[1]) + 1 - prefix[:, None], 0, params.shape[1] - 1)
        return params[task[:, None], step], cache

    return generate.Decoder(lambda batch, length: jnp.zeros((1, batch, length)), decode)


def test_positions_probability_and_early_stop_worked_by_hand():
    shown = []
    script = [7, 8, ROW, 9, END]
    params = np.full((2, 5, VOCAB), -np.inf, np.float32)
    params[0, np.arange(5), script] = math.log(0.5)
    params[0, np.arange(5), START] = math.log(0.25)
    params[0, np.arange(5), SEP] = math.log(0.25)
    params[1, :, END] = 0
    prompts = _prompts([ENCODED[1], ENCODED[2]], [0, 1], [0, 0])
    found = greedy(_scripted(shown), params, prompts, 100, 2)
    jax.effects_barrier()
    assert found.tokens[0, :6].tolist() == [*script, END]
    assert found.length.tolist() == [5, 1] and found.finished.tolist() == [True, True]
    np.testing.assert_allclose(found.logprob, [5 * math.log(0.5), 0], rtol=1e-6)
    assert [p[0] for p in shown] == [[0, 0, 3], [1, 0, 3], [2, 0, 3], [0, 1, 3]]  # and none after END


def test_a_row_that_never_ends_runs_to_the_cap_and_is_not_finished():
    params = np.zeros((1, 1, VOCAB), np.float32)
    params[0, 0, 4] = 1
    found = greedy(_scripted([]), params, _prompts([ENCODED[0]], [0], [0]), 6)
    assert found.tokens.tolist() == [[4] * 6] and found.length.tolist() == [6] and found.finished.tolist() == [False]


def test_the_batch_stays_full():
    """Answers of 5, 2, 5 and 2 tokens in two rows: the third prompt takes the place of the second, the last that of the first."""
    shown = []
    params = np.zeros((2, 5, VOCAB), np.float32)
    params[0, np.arange(5), [7, 8, 9, 9, END]] = 1
    params[1, np.arange(2), [7, END]] = 1
    found = greedy(_scripted(shown), params, _prompts([ENCODED[0]] * 4, [0, 1, 0, 1], [0] * 4), 9, 2)
    jax.effects_barrier()
    assert found.length.tolist() == [5, 2, 5, 2]
    assert len(shown) == 5  # the first token of each comes with its prompt; 4 + 4 in batches of two


def test_one_compilation_for_any_parameters_and_number_of_prompts():
    counter = []
    decoder = _hashing(counter)
    for count in range(1, 5):
        greedy(decoder, _params(count), jax.tree.map(lambda a, n=count: a[:n], PROMPTS), 5)
    assert len(counter) == 2  # the prompt and one token


@settings(max_examples=25)
@given(
    seed=st.integers(0, 2**20),
    scale=st.sampled_from([2.0, 4.0, 6.0]),
    ends=st.sampled_from([0.0, 3.0]),
    limits=st.sampled_from([(0.02, 16), (0.1, 1), (0.3, 16), (0.7, 1)]),
)
def test_search_finds_what_a_recursive_depth_first_search_finds(seed, scale, ends, limits):
    cap, (least, batch) = 5, limits
    params = _params(seed, scale)
    params[:, END] += ends
    found = search(HASHING, params, PROMPTS, cap, least, batch)
    assert found.tokens.shape == (4, math.floor(1 / least + 1e-9), cap)
    for row, prompt in enumerate(ENCODED):
        expected, met = _depth_first(params, prompt, int(PROMPTS.task[row]), int(PROMPTS.dihedral[row]), cap, math.log(least))
        assume(min(abs(m - math.log(least)) for m in met) > 1e-4)
        kept = [i for i in range(found.tokens.shape[1]) if found.finished[row, i]]
        got = {tuple(found.tokens[row, i, : found.length[row, i]].tolist()): float(found.logprob[row, i]) for i in kept}
        assert len(got) == len(kept) and got.keys() == expected.keys()
        for answer, logprob in got.items():
            assert logprob == pytest.approx(expected[answer], abs=1e-4)
        assert sorted(got.values(), reverse=True) == list(got.values())


def test_the_search_finds_something_to_find():
    """The property above would also hold for models with nothing to find."""
    sizes = []
    for seed in range(10):
        params = _params(seed)
        params[:, END] += 3
        sizes += np.sum(search(HASHING, params, PROMPTS, 5, 0.02).finished, -1).tolist()
    assert max(sizes) > 3


def test_search_worked_by_hand():
    """0.6 · END, 0.4 · (a colour, then 0.55 · END or 0.45 · another colour, then END): probabilities 0.6, 0.22, 0.18."""
    params = np.full((1, 3, VOCAB), -np.inf, np.float32)
    params[0, 0, [END, 1]] = np.log([0.6, 0.4])
    params[0, 1, [END, 2]] = np.log([0.55, 0.45])
    params[0, 2, END] = 0
    prompts = _prompts([ENCODED[0]], [0], [0])
    found = search(_scripted([]), params, prompts, 9, 0.15)
    np.testing.assert_allclose(np.exp(found.logprob[0]), [0.6, 0.22, 0.18, 0, 0, 0], rtol=1e-5)
    assert found.length[0].tolist() == [1, 2, 3, 0, 0, 0]
    assert found.finished[0].tolist() == [True] * 3 + [False] * 3
    assert found.tokens[0, :3, :3].tolist() == [[END] * 3, [1, END, END], [1, 2, END]]
    assert np.sum(search(_scripted([]), params, prompts, 9, 0.3).finished) == 1
    assert np.sum(search(_scripted([]), params, prompts, 2, 0.15).finished) == 2  # the third needs three tokens


def test_when_the_frontier_overflows_fewer_prompts_are_asked_at_once():
    """Each of eight prompts has ten completions of a tenth, and 20 rows hold those of two."""
    asked = []
    params = np.full((1, 2, VOCAB), -np.inf, np.float32)
    params[0, 0, :10] = np.log(0.1)
    params[0, 1, END] = 0
    prompts = _prompts([ENCODED[0]] * 8, [0] * 8, [0] * 8)

    def ask(numbers):
        asked.append(len(set(numbers)))
        return _ask(prompts)(numbers)

    found = _in_order(generate.search(_scripted([]), params, ask, 8, 9, 0.09, 20), 8)
    assert [sorted(row) for row in found.tokens[:, :10, 0].tolist()] == [list(range(10))] * 8
    assert found.finished[:, :10].all() and not found.finished[:, 10:].any()
    assert asked == [6, 3, 1, 2, 3, 1, 2, 2]  # six and three do not fit; after each success one more is tried
