"""A dictionary whose latents are dealt out takes the steps of the whole one: threads in the place of ranks."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from shapes import ARCHITECTURES, BLOCKS, F, assert_same, dead_ids, gradients, make, moment, rows
from threads import Line
from torch import Tensor

from sparsepilot.autoencoders import weights
from sparsepilot.autoencoders.base import Autoencoder
from sparsepilot.autoencoders.blocks import Blocks
from sparsepilot.autoencoders.prefixes import FixedPrefixes, RandomPrefixes
from sparsepilot.autoencoders.revival import AuxK, PreActivation
from sparsepilot.autoencoders.step import Step
from sparsepilot.autoencoders.topk import TopK
from sparsepilot.autoencoders.weights import normal_rows
from sparsepilot.errors import ConfigError
from sparsepilot.ops import product
from sparsepilot.ops.among_shards import num_kept
from sparsepilot.parallel.latents import Shard
from sparsepilot.parallel.mesh import Group
from sparsepilot.training.resample import resample


@settings(max_examples=200, deadline=None)
@given(
    num_rows=st.integers(1, 8), widths=st.lists(st.integers(0, 6), min_size=1, max_size=5), share=st.floats(0, 1),
    distinct=st.integers(1, 9), seed=st.integers(0, 2**16),
)  # fmt: skip
def test_shards_together_choose_what_one_chooses(
    num_rows: int, widths: list[int], share: float, distinct: int, seed: int
) -> None:
    """Ties included: of equal ones the first in the order of latents, as a stable sort has it."""
    widths[0] = max(widths[0], 1)
    total, widest = sum(widths), max(widths)
    make_values = torch.Generator().manual_seed(seed)
    whole_BF = torch.randint(-distinct, distinct, (num_rows, total), generator=make_values).float()
    k = 1 + round(share * (total - 1))
    first_BK = whole_BF.sort(dim=1, descending=True, stable=True).indices[:, :k]
    expected_BF = torch.zeros_like(whole_BF, dtype=torch.bool).scatter(1, first_BK, True)
    parts = whole_BF.split(widths, dim=1)
    padded = [torch.nn.functional.pad(part, (0, widest - part.shape[1]), value=-torch.inf) for part in parts]
    counts_SB = num_kept(torch.stack(padded), k)
    found = []
    for part, counts_B in zip(parts, counts_SB, strict=True):
        place_BK = part.sort(dim=1, descending=True, stable=True).indices.argsort(dim=1)
        found.append(place_BK < counts_B[:, None])
    assert torch.equal(torch.cat(found, dim=1), expected_BF)


def test_a_nan_stays_so_that_the_loss_shows_it() -> None:
    values_SRK = torch.tensor([[[1.0, torch.nan]], [[3.0, 2.0]]])
    assert num_kept(values_SRK, 1).tolist() == [[1], [0]]
    assert num_kept(values_SRK, 3).tolist() == [[1], [0]]


def dealt_out(architecture: str, blocks: str, line: Line, **common) -> tuple[Autoencoder, list[Autoencoder]]:
    """A model in the middle of a run, and the same one as shards."""
    whole = make(architecture, blocks, **common)
    state = whole.state_dict()
    names = {name for name, tensor in state.items() if tensor.ndim > 0 and tensor.shape[0] == F}
    assert names == set(whole.per_latent)
    shards = []
    for rank in range(line.size):
        model = ARCHITECTURES[architecture](BLOCKS[blocks], **common, shard=line.shard(F, rank))
        model.load_state_dict(
            {name: model.shard.own(tensor) if name in names else tensor for name, tensor in state.items()}
        )
        model.total_variance = whole.total_variance
        shards.append(model)
    return whole, shards


def own_ids(shard: Shard, ids_A: Tensor) -> Tensor:
    here_A = ids_A - shard.first
    return here_A[(here_A >= 0) & (here_A < shard.num_latents)]


def assert_same_step(line: Line, whole: Autoencoder, shards: list[Autoencoder], num_dead: int = 0, **changes) -> Step:
    dead = dead_ids(num_dead)
    step = whole(*rows(whole), moment(whole, dead, seed=3, **changes))
    found = line.run(
        lambda rank: (
            one := shards[rank](*rows(whole), moment(whole, own_ids(shards[rank].shard, dead), seed=3, **changes)),
            gradients(shards[rank], one.loss) if one.loss.requires_grad else {},
        )
    )
    expected = gradients(whole, step.loss) if step.loss.requires_grad else {}
    assert torch.equal(torch.cat([one.firings_F for one, _ in found]), step.firings_F)
    for one, by_name in found:
        assert one.terms.keys() == step.terms.keys()
        assert_same(one.loss.detach(), step.loss.detach(), "loss")
        assert_same(one.y_hat_BD, step.y_hat_BD, "y_hat")
        for name, value in step.terms.items():
            assert_same(one.terms[name], value, name)
        for name, gradient in by_name.items():
            if name not in whole.per_latent:
                assert_same(gradient, expected[name], f"gradient of {name}", 2e-5)
    for name in expected:
        if name in whole.per_latent:
            gradient = torch.cat([by_name[name] for _, by_name in found])
            assert_same(gradient, expected[name], f"gradient of {name}", 2e-5)
    return step


@pytest.mark.parametrize("dense_above", [1.0, 0.0], ids=["sparse", "dense"])
@pytest.mark.parametrize("blocks", ["autoencoder", "crosscoder", "transcoder-skip"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture(monkeypatch, architecture: str, blocks: str, dense_above: float) -> None:
    for size, prefixes in ((2, None), (3, FixedPrefixes([0.1, 0.4])), (4, RandomPrefixes(4))):
        line = Line(size, monkeypatch)
        models = dealt_out(architecture, blocks, line, dense_above=dense_above, prefixes=prefixes)
        step = assert_same_step(line, *models)
        assert 0 < int(step.firings_F.sum()) < F * len(step.y_hat_BD)


REVIVALS = {
    "aux_k few": (AuxK(3, 0.5), 40),
    "aux_k all": (AuxK(None, 0.5), 5),
    "aux_k one": (AuxK(3, 0.5), 1),  # most shards have no dead latent
    "aux_k nobody": (AuxK(None, 0.5), 0),
    "pre_activation": (PreActivation(0.02), 9),
    "pre_activation one": (PreActivation(0.02), 1),
}


@pytest.mark.parametrize("dense_above", [1.0, 0.0], ids=["sparse", "dense"])
@pytest.mark.parametrize("revival", REVIVALS)
@pytest.mark.parametrize("architecture", ["topk", "batchtopk", "jumprelu-tanh"])
def test_every_revival(monkeypatch, architecture: str, revival: str, dense_above: float) -> None:
    how, num_dead = REVIVALS[revival]
    line = Line(4, monkeypatch)
    models = dealt_out(architecture, "autoencoder", line, dense_above=dense_above, revival=how)
    step = assert_same_step(line, *models, num_dead=num_dead)
    assert (how.term_name in step.terms) == (num_dead > 0)


@pytest.mark.parametrize("half_product", [False, True])
@pytest.mark.parametrize("architecture", ["topk-multi", "batchtopk", "gated"])
def test_tiles_and_half_products(monkeypatch, architecture: str, half_product: bool) -> None:
    monkeypatch.setitem(product.TILE_BYTES, "cpu", 1)  # 64 rows, so two tiles
    line = Line(3, monkeypatch)
    for dense_above in (1.0, 0.0):
        options = {"tile_latents": 20, "half_product": half_product, "dense_above": dense_above}
        assert_same_step(line, *dealt_out(architecture, "autoencoder", line, revival=AuxK(3, 0.5), **options), 30)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_as_at_inference(monkeypatch, architecture: str) -> None:
    line = Line(2, monkeypatch)
    whole, shards = dealt_out(architecture, "autoencoder", line)
    for model in (whole, *shards):
        if architecture == "batchtopk":
            model.threshold.fill_(0.9)  # type: ignore[operator]
    assert_same_step(line, whole, shards, inference=True)


@pytest.mark.parametrize("architecture", ["topk", "jumprelu-step", "gated"])
def test_norms_and_coherence(monkeypatch, architecture: str) -> None:
    line = Line(3, monkeypatch)
    whole, shards = dealt_out(architecture, "transcoder-skip", line)
    for parameter in whole.parameters():
        parameter.grad = torch.randn_like(parameter)
    for model in shards:
        for name, parameter in model.named_parameters():
            gradient = whole.get_parameter(name).grad
            assert gradient is not None
            parameter.grad = (model.shard.own(gradient) if name in model.per_latent else gradient).clone()
    norms = line.run(lambda rank: shards[rank].gradient_norm())
    assert norms[0].shape == whole.gradient_norm().shape
    for norm in norms:
        assert_same(norm, whole.gradient_norm(), "norm")
    if architecture == "jumprelu-step":
        close = torch.no_grad()(lambda model: model.close_step({}, moment(whole)))
        close(whole)
        line.run(lambda rank: close(shards[rank]))
        for model in shards:
            assert_same(model.threshold_coherence(), whole.threshold_coherence(), "coherence")


@pytest.mark.parametrize("architecture", ["topk", "relu-l1", "gated"])
def test_resampling(monkeypatch, architecture: str) -> None:
    line = Line(4, monkeypatch)
    whole, shards = dealt_out(architecture, "autoencoder", line)
    dead, (x_BD, y_BD) = dead_ids(20), rows(whole)
    sq_error_B = torch.rand(len(x_BD), generator=torch.Generator().manual_seed(5))
    sq_error_B[13:] = 0  # fewer rows with a loss than dead latents

    def one(model: Autoencoder) -> int:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        return resample(model, own_ids(model.shard, dead), x_BD, y_BD, sq_error_B, 0.2, 0, 4096, optimizer)

    assert one(whole) == 13
    assert line.run(lambda rank: one(shards[rank])) == [13] * 4
    for name in whole.per_latent:
        assert_same(
            torch.cat([m.get_parameter(name) for m in shards]).detach(), whole.get_parameter(name).detach(), name
        )


@pytest.mark.parametrize("architecture", ["topk", "batchtopk", "jumprelu-step", "gated"])
def test_beginning_from_a_dictionary(monkeypatch, architecture: str) -> None:
    whole, shards = dealt_out(architecture, "transcoder-skip", Line(3, monkeypatch))
    other = make(architecture, "transcoder-skip", seed=9)
    for model in (whole, *shards):
        model.adopt(other.inference_tensors())
    for name, parameter in whole.named_parameters():
        assert torch.equal(parameter, other.get_parameter(name)) or name == "log_threshold"
        parts = [model.get_parameter(name) for model in shards]
        assert torch.equal(torch.cat(parts) if name in whole.per_latent else parts[0], parameter)
    for model in shards:
        assert torch.equal(model.thresholds(), model.shard.own(whole.thresholds()))


def test_traffic_does_not_grow_with_the_dictionary(monkeypatch) -> None:
    """Numbers that a shard gives away in a step and its backward pass: the same for four times the latents."""
    sent = []
    for d_sae in (64, 256):
        line = Line(2, monkeypatch)
        models = [TopK(Blocks.autoencoder(12), d_sae, 2, shard=line.shard(d_sae, rank)) for rank in range(2)]
        x_BD = torch.randn(50, 12)
        line.run(lambda r, m=models, x=x_BD: m[r](x, x, moment(m[r])).loss.backward())
        sent.append(line.messages)
    assert sent[0] == sent[1]


@pytest.mark.parametrize(("d_sae", "width", "block"), [(96, 7, 16), (100, 3, 16), (30, 5, 2**14), (4, 3, 16)])
def test_a_shard_begins_as_its_part_of_the_whole(monkeypatch, d_sae: int, width: int, block: int) -> None:
    monkeypatch.setattr(weights, "DRAWN_ROWS", block)
    torch.manual_seed(3)
    whole, after = torch.randn(d_sae, width), torch.randn(5)
    for rank in range(2):
        torch.manual_seed(3)
        assert torch.equal(normal_rows(Shard(d_sae, Group(2, rank)), width), whole[rank * d_sae // 2 :][: d_sae // 2])
        assert torch.equal(torch.randn(5), after)


def test_what_cannot_be_dealt_out_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"model.d_sae = 96: must be a multiple of 5, the ranks that share"):
        Shard(96, Group(5, 0))
    with pytest.raises(ConfigError, match=r"a cross-layer transcoder's latents cannot be dealt out to 2 ranks"):
        make("topk", "cross-layer", shard=Shard(F, Group(2, 0)))
