"""One pass with bounded memory finds what a plain look at all codes at once finds."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from shapes import ARCHITECTURES, make

from sparsepilot.analysis.features import survey as surveys
from sparsepilot.analysis.features.contexts import BANDS, SHOWN_PER_BAND, SHOWN_TOP, choose
from sparsepilot.analysis.features.directions import logit_lens, nearest
from sparsepilot.analysis.features.kept import AFTER, BEFORE, NO_TOKEN, WIDTH, Kept, random_keys, top_keys
from sparsepilot.analysis.features.listing import trimmed
from sparsepilot.analysis.features.score import FEWEST_CONTEXTS, A, Scorer
from sparsepilot.analysis.features.sparse_codes import SparseEncoder
from sparsepilot.analysis.features.survey import NUM_BINS, Reader, Survey, bin_edges, bins_of
from sparsepilot.autoencoders.blocks import Blocks
from sparsepilot.data.cache import Cache
from sparsepilot.data.plan import CachePlan
from sparsepilot.data.writer import CacheWriter, create
from sparsepilot.errors import DataError
from sparsepilot.interop.dictionary import Dictionary, build
from sparsepilot.interop.fold import fold

SITE = "model.layers.1"
LATENTS, VOCABULARY = 40, 50


def dictionary(architecture: str, blocks: Blocks, d_in: int) -> Dictionary:
    model = make(architecture, blocks)
    if architecture == "batchtopk":
        model.threshold.fill_(0.9)  # type: ignore[operator]
    cfg = {**model.inference_config(model.knob.initial), "sites": ["a"], "sites_out": ["a"]}
    ones = torch.ones(model.d_in), torch.ones(model.d_out)
    return build(cfg, fold(cfg, model.inference_tensors(), *ones), Path("sae.json"))


@pytest.mark.parametrize(
    "blocks", [Blocks.autoencoder(12), Blocks((6, 6), (6, 6), same=False, cross_layer=True)], ids=["one", "layers"]
)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@torch.no_grad()
def test_pairs_are_the_codes_above_zero(architecture: str, blocks: Blocks) -> None:
    sae = dictionary(architecture, blocks, 12)
    x_BD = 2 * torch.randn(300, sae.cfg["d_in"], generator=torch.Generator().manual_seed(1))
    pairs = SparseEncoder(sae)(x_BD)
    codes_BF = torch.zeros(300, sae.cfg["d_sae"])
    codes_BF[pairs.rows_P, pairs.ids_P] = pairs.values_P
    assert bool((pairs.values_P > 0).all())
    assert len(pairs.ids_P) == len({*zip(pairs.rows_P.tolist(), pairs.ids_P.tolist(), strict=True)}) > 300
    torch.testing.assert_close(codes_BF, sae.encode(x_BD), rtol=1e-4, atol=1e-5)


@given(st.lists(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 2**63)), max_size=30, unique=True), max_size=6))
def test_kept_are_the_largest_whatever_the_order(batches: list[list[tuple[int, int]]]) -> None:
    kept, all_keys = Kept(4, 3), defaultdict(set)
    for batch in batches:
        new = [pair for pair in batch if pair[1] not in all_keys[pair[0]]]
        latents_C = np.array([latent for latent, _ in new], dtype=np.int64)
        keys_C = np.array([key for _, key in new], dtype=np.uint64)
        placed = kept.place(latents_C, keys_C)
        assert np.array_equal(latents_C[placed.candidates_A], placed.latents_A)
        assert np.array_equal(kept.key_FN[placed.latents_A, placed.slots_A], keys_C[placed.candidates_A])
        for latent, key in new:
            all_keys[latent].add(key)
    for latent in range(4):
        assert sorted(kept.key_FN[latent][kept.key_FN[latent] > 0].tolist()) == sorted(all_keys[latent])[-3:]


@given(st.lists(st.floats(2.0**-16, 2.0**17, width=32), min_size=1))
def test_bins_hold_what_their_edges_say(values: list[float]) -> None:
    edges = bin_edges()
    assert len(edges) == NUM_BINS + 1
    wanted = np.clip(np.searchsorted(edges, values, side="right") - 1, 0, NUM_BINS - 1)
    assert np.array_equal(bins_of(np.array(values, dtype=np.float32)), wanted)


def test_keys_order_by_activation_then_row() -> None:
    values, rows = np.array([1.5, 3.0, 3.0, 0.1], dtype=np.float32), np.array([5, 9, 2, 0])
    assert np.argsort(top_keys(values, rows))[::-1].tolist() == [2, 1, 0, 3]
    keys = random_keys(np.repeat(np.arange(50), 200), np.tile(np.arange(200), 50))
    assert len(set(keys.tolist())) == 10_000
    assert abs((keys > 2**63).mean() - 0.5) < 0.02


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    """830 rows of contexts of 16 positions; a document ends after 13 rows, mostly within one."""
    path = tmp_path_factory.mktemp("survey") / "cache"
    create(path, CachePlan(700, 130, {SITE: 24}, "float32", 32, 128, {"kind": "test"}))
    writer, make_rows = CacheWriter(path), torch.Generator().manual_seed(0)
    x_ND, tokens_N = (
        10 * torch.randn(830, 24, generator=make_rows),
        np.random.default_rng(0).integers(0, VOCABULARY, 830),
    )
    for rows in writer.pending():
        numbers = np.arange(rows.start, rows.stop)
        writer.write_shard(rows, {SITE: x_ND[numbers]}, tokens_N[numbers], numbers % 16, numbers // 13)
    writer.finish()
    return Cache(path)


@pytest.fixture(scope="module")
def sae() -> Dictionary:
    """Some latents fire often, some seldom, one never."""
    make_weights = torch.Generator().manual_seed(0)
    tensors = {
        "W_enc": torch.randn(24, LATENTS, generator=make_weights),
        "b_enc": -torch.linspace(0, 80, LATENTS),
        "W_dec": torch.randn(LATENTS, 24, generator=make_weights),
        "b_dec": torch.zeros(24),
    }
    tensors["b_enc"][7] = -1e6
    cfg = {"architecture": "relu", "blocks": "autoencoder", "d_in": 24, "d_sae": LATENTS, "d_out": 24, "sites": [SITE]}
    return build(cfg, tensors, Path("sae.json"))


def surveyed(cache: Cache, sae: Dictionary, num_rows: int = 830) -> Survey:
    survey, reader = Survey(LATENTS, VOCABULARY), Reader(cache, [SITE], SparseEncoder(sae), num_rows)
    while survey.next_row < num_rows:
        survey.digest(survey.next_row, *reader.gather(survey.next_row))
    return survey


@pytest.fixture(scope="module")
def plain(cache: Cache, sae: Dictionary) -> torch.Tensor:
    with torch.no_grad():
        return sae.encode(cache.read(SITE, 0, 830))


def filled(kept: Kept, latent: int) -> Iterator[int]:
    return (slot for slot in range(kept.n) if kept.key_FN[latent, slot] > 0)


def test_a_survey_is_a_look_at_all_codes(cache: Cache, sae: Dictionary, plain: torch.Tensor) -> None:
    survey = surveyed(cache, sae)
    tokens, documents = cache.tokens(0, 830), cache.documents(0, 830)
    codes_NF = plain.numpy()
    assert np.array_equal(survey.fires_F, (codes_NF > 0).sum(axis=0))
    np.testing.assert_allclose(survey.sum_F, codes_NF.sum(axis=0, dtype=np.float64), rtol=1e-5)
    assert np.array_equal(survey.token_counts_V, np.bincount(tokens, minlength=VOCABULARY))
    assert survey.fires_F[7] == 0
    for latent in range(LATENTS):
        fired = codes_NF[:, latent]
        assert np.array_equal(survey.histogram_FH[latent], np.bincount(bins_of(fired[fired > 0]), minlength=NUM_BINS))
        best = [max(range(start, min(start + 16, 830)), key=fired.__getitem__) for start in range(0, 830, 16)]
        wanted = sorted((row for row in best if fired[row] > 0), key=lambda row: -fired[row])[: survey.top.n]
        slots = sorted(filled(survey.top, latent), key=lambda slot: -survey.top.value_FN[latent, slot])
        assert [int(survey.top.row_FN[latent, slot]) for slot in slots] == wanted
        assert len(list(filled(survey.sample, latent))) == min(survey.sample.n, (fired > 0).sum())
        for kept in (survey.top, survey.sample):
            for slot in filled(kept, latent):
                row = int(kept.row_FN[latent, slot])
                around = range(row - BEFORE, row + AFTER + 1)
                same = [0 <= r < 830 and r // 16 == row // 16 and documents[r] == documents[row] for r in around]
                found = kept.token_FNW[latent, slot].tolist()
                assert found == [tokens[r] if there else NO_TOKEN for r, there in zip(around, same, strict=True)]
                np.testing.assert_allclose(
                    kept.value_FNW[latent, slot],
                    [fired[r] if there else 0 for r, there in zip(around, same, strict=True)],
                    rtol=1e-4, atol=1e-4,
                )  # fmt: skip


def state(survey: Survey) -> dict[str, object]:
    """All that is known, slots in the order of their keys."""
    out: dict[str, object] = {"fires": survey.fires_F.tolist(), "bins": survey.histogram_FH.tolist()}
    for name, kept in (("top", survey.top), ("sample", survey.sample)):
        order_FN = np.argsort(kept.key_FN, axis=1)
        out[name] = [np.take_along_axis(getattr(kept, array), order_FN, axis=1).tolist() for array in Kept.ARRAYS[:3]]
        out[name + " values"] = np.take_along_axis(kept.value_FNW, order_FN[:, :, None], axis=1).tolist()
    return out


def test_it_does_not_matter_where_pieces_end_nor_where_it_was_broken(
    cache: Cache, sae: Dictionary, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = surveyed(cache, sae)
    monkeypatch.setattr(surveys, "PIECE_ROWS", 40)
    monkeypatch.setattr(surveys, "DIGEST_PAIRS", 500)
    parts, reader = Survey(LATENTS, VOCABULARY), Reader(cache, [SITE], SparseEncoder(sae), 830)
    for _ in range(3):
        parts.digest(parts.next_row, *reader.gather(parts.next_row))
    parts.save(tmp_path / "pass.npz", {"of": 1})
    resumed = Survey(LATENTS, VOCABULARY)
    assert not resumed.restore(tmp_path / "pass.npz", {"of": 2})
    assert not resumed.restore(tmp_path / "none.npz", {"of": 1})
    assert resumed.next_row == 0
    assert resumed.restore(tmp_path / "pass.npz", {"of": 1})
    assert resumed.next_row == parts.next_row < 830
    while resumed.next_row < 830:
        resumed.digest(resumed.next_row, *reader.gather(resumed.next_row))
    assert state(resumed) == state(whole)
    content = (tmp_path / "pass.npz").read_bytes()
    for length in (0, 10, len(content) // 2):
        (tmp_path / "pass.npz").write_bytes(content[:length])
        with pytest.raises(DataError, match=r"pass\.npz: is damaged .*; remove it and start again"):
            Survey(LATENTS, VOCABULARY).restore(tmp_path / "pass.npz", {"of": 1})


def test_what_is_shown_differs_and_covers_all_quarters(cache: Cache, sae: Dictionary, plain: torch.Tensor) -> None:
    survey = surveyed(cache, sae)
    shown = choose(survey.top, survey.sample, slice(0, LATENTS))
    assert shown[7] == ([], [[]] * BANDS)
    for latent in (0, 10, 30):
        top, bands = shown[latent]
        assert 0 < len(top) <= SHOWN_TOP
        near = slice(BEFORE - 8, BEFORE + 3)
        assert len({tuple(survey.top.token_FNW[latent, slot, near]) for slot in top}) == len(top)
        values = [survey.top.value_FN[latent, slot] for slot in top]
        assert values == sorted(values, reverse=True)
        drawn = [survey.sample.value_FN[latent, slot] for band in bands for slot in band]
        assert drawn == sorted(drawn, reverse=True)
        assert all(len(band) <= SHOWN_PER_BAND for band in bands)
        rows = {int(survey.sample.row_FN[latent, slot]) for band in bands for slot in band}
        assert not rows & {int(survey.top.row_FN[latent, slot]) for slot in top}


def test_the_score_is_its_formula() -> None:
    make_numbers = np.random.default_rng(0)
    embedding_VD = torch.from_numpy(make_numbers.standard_normal((VOCABULARY, 8)).astype(np.float32))
    counts_V = make_numbers.integers(1, 1000, VOCABULARY)
    top, sample = Kept(4, 20), Kept(4, 12)
    for kept in (top, sample):
        kept.key_FN[:] = make_numbers.permutation(kept.key_FN.size).reshape(kept.key_FN.shape) + 1
        kept.row_FN[:] = np.arange(kept.row_FN.size).reshape(kept.row_FN.shape) + (1000 if kept is sample else 0)
        kept.value_FN[:] = make_numbers.uniform(0.5, 2, kept.value_FN.shape)
        kept.token_FNW[:] = make_numbers.integers(0, VOCABULARY, kept.token_FNW.shape)
        kept.token_FNW[0, :, :9] = NO_TOKEN  # a document's beginning
    top.token_FNW[1, :, BEFORE - 9 : BEFORE + 1] = sample.token_FNW[1, :, BEFORE - 9 : BEFORE + 1] = range(10)
    top.key_FN[2, FEWEST_CONTEXTS - 1 :] = 0
    sample.key_FN[2] = 0
    latents = slice(0, 4)
    shown = choose(top, sample, latents)
    scores = Scorer(embedding_VD, counts_V)(top, sample, latents, shown)
    assert scores[2] is None

    share_V = counts_V / counts_V.sum()
    weight_V = A / (A + share_V)
    E = embedding_VD.double().numpy()
    mu = (share_V * weight_V) @ E / (share_V * weight_V).sum()
    for latent in (0, 3):
        contexts = [(top, slot) for slot in shown[latent].top]
        contexts += [(sample, slot) for band in shown[latent].bands for slot in band]
        assert len(contexts) == SHOWN_TOP + BANDS * SHOWN_PER_BAND
        units = []
        for kept, slot in contexts:
            u = np.zeros(8)
            for far in range(BEFORE + 1):
                token = kept.token_FNW[latent, slot, BEFORE - far]
                if token != NO_TOKEN:
                    u += weight_V[token] * 2 ** (-far / 4) * (E[token] - mu) / np.linalg.norm(E[token] - mu)
            units.append(u / np.linalg.norm(u))
        a = [float(kept.value_FN[latent, slot]) for kept, slot in contexts]
        pairs = [(n, m) for n in range(len(a)) for m in range(len(a)) if n != m]
        wanted = sum(a[n] * a[m] * units[n] @ units[m] for n, m in pairs) / sum(a[n] * a[m] for n, m in pairs)
        assert scores[latent] == pytest.approx(wanted, abs=1e-5)
    assert scores[0] is not None
    assert scores[1] is not None
    assert scores[1] > 0.8 > 0.5 > scores[0]  # the same nine tokens before each; all else was drawn at random


def test_nearest_and_lens_are_the_plain_products() -> None:
    make_numbers = torch.Generator().manual_seed(0)
    d_FD, u_VD = torch.randn(70, 6, generator=make_numbers), torch.randn(90, 6, generator=make_numbers)
    done: list[int] = []
    near = nearest(d_FD, 5, done.append)
    cosines = torch.nn.functional.cosine_similarity(d_FD[:, None], d_FD[None], dim=2) - 9 * torch.eye(70)
    best = cosines.topk(5, dim=1)
    assert torch.equal(near.ids_FN, best.indices)
    torch.testing.assert_close(near.values_FN, best.values)
    assert sum(done) == 70
    assert nearest(d_FD[:2], 5, done.append).ids_FN.tolist() == [[1], [0]]
    lens = logit_lens(d_FD, u_VD, 4, done.append)
    logits = d_FD @ u_VD.T
    assert torch.equal(lens.promotes.ids_FN, logits.topk(4, dim=1).indices)
    assert torch.equal(lens.suppresses.ids_FN, (-logits).topk(4, dim=1).indices)
    assert bool((lens.suppresses.values_FN < 0).all())
    assert trimmed([0] * NUM_BINS) == (0, [])
    assert len(bin_edges()) == NUM_BINS + 1 == 97
    assert WIDTH == BEFORE + 1 + AFTER
