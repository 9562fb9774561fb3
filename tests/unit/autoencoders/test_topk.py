"""TopK against a plain restatement of its published formula, AuxK included."""

from __future__ import annotations

import pytest
import torch

from sparsepilot.autoencoders.topk import TopK

B, D, F, K = 64, 12, 80, 5


def make(aux_k: int = 4, coefficient: float = 1 / 32) -> TopK:
    torch.manual_seed(0)
    model = TopK(D, F, K, aux_k=aux_k, aux_k_coefficient=coefficient)
    with torch.no_grad():
        model.b_enc.normal_(0, 0.1)
        model.W_enc.add_(0.1 * torch.randn_like(model.W_enc))
    model.initialise(torch.randn(D), total_variance=7.0)
    return model


@pytest.mark.parametrize("num_dead", [0, 2, 30])
def test_loss_and_gradients_equal_the_formula(num_dead: int) -> None:
    model = make()
    x_BD = torch.randn(B, D, generator=torch.Generator().manual_seed(1))
    dead_ids_A = torch.randperm(F, generator=torch.Generator().manual_seed(2))[:num_dead].sort().values
    mean_sq_residual = torch.tensor(3.0)
    step = model(x_BD, float(K), dead_ids_A, mean_sq_residual)
    grads = torch.autograd.grad(step.loss, list(model.parameters()))

    # Gao et al. 2024, section 2.3 and appendix A.2, written densely
    W_enc, b_enc, W_dec, b_dec = model.W_enc, model.b_enc, model.W_dec, model.b_dec
    pre = (x_BD - b_dec) @ W_enc.T + b_enc
    top = pre.topk(K).indices
    codes = torch.zeros_like(pre).scatter(1, top, pre.gather(1, top).relu())
    x_hat = codes @ W_dec + b_dec
    loss = ((x_BD - x_hat) ** 2).sum(1).mean()
    if num_dead:
        alive = torch.ones(F, dtype=torch.bool)
        alive[dead_ids_A] = False
        masked = pre.masked_fill(alive, float("-inf"))
        top = masked.topk(min(4, num_dead)).indices
        dead_codes = torch.zeros_like(pre).scatter(1, top, pre.gather(1, top).relu())
        e = (x_BD - x_hat).detach()
        # b_dec is not decoded a second time (field notes, mistake 5); the weight is in units of the data's variance
        loss = loss + 7.0 / 32 * ((e - dead_codes @ W_dec) ** 2).sum(1).mean() / 3.0
    torch.testing.assert_close(step.loss, loss)
    names = [name for name, _ in model.named_parameters()]
    for name, mine, theirs in zip(names, grads, torch.autograd.grad(loss, list(model.parameters())), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5 * float(theirs.abs().max()), msg=name)


def test_aux_k_trains_the_encoder_of_dead_latents_and_only_theirs() -> None:
    model = make()
    x_BD = torch.randn(B, D, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        model.b_enc[:10] = -100.0  # never among the top, yet their direction may explain the residual
        model.b_enc[3] = 0.0
    dead = torch.tensor([3])
    with_aux = torch.autograd.grad(model(x_BD, float(K), dead, torch.tensor(1.0)).loss, model.W_enc)[0]
    without = torch.autograd.grad(model(x_BD, float(K), dead[:0], torch.tensor(1.0)).loss, model.W_enc)[0]
    changed = (with_aux != without).any(dim=1).nonzero().flatten().tolist()
    assert changed == [3]


def test_forward_twice_changes_nothing() -> None:
    model = make()
    x_BD = torch.randn(B, D)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    losses = [float(model(x_BD, float(K), torch.tensor([1, 2]), torch.tensor(1.0)).loss.detach()) for _ in range(2)]
    assert losses[0] == losses[1]
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_sparse_step_equals_dense_encode_and_decode() -> None:
    model = make()
    x_BD = torch.randn(B, D)
    step = model.evaluate(x_BD, float(K))
    codes_BF = model.encode(x_BD)
    assert int((codes_BF > 0).sum(1).max()) <= K
    torch.testing.assert_close(step.x_hat_BD, model.decode(codes_BF).detach(), rtol=1e-5, atol=1e-5)
    scattered = torch.zeros(B, F).scatter(1, step.active.ids_BK, step.codes_BK)
    torch.testing.assert_close(scattered, codes_BF.detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("rows", "k"), [(1, K), (B, F), (1, 1)])
def test_edges_have_finite_gradients(rows: int, k: int) -> None:
    model = make()
    x_BD = 1e4 * torch.randn(rows, D)
    model(x_BD, float(k), torch.arange(F), torch.tensor(1.0)).loss.backward()
    assert all(bool(torch.isfinite(p.grad).all()) for p in model.parameters() if p.grad is not None)


def test_an_empty_row_decodes_to_b_dec() -> None:
    model = make()
    with torch.no_grad():
        model.b_enc.fill_(-1e6)
    step = model(torch.randn(3, D), float(K), torch.tensor([0]), torch.tensor(1.0))
    step.loss.backward()
    assert int((step.codes_BK > 0).sum()) == 0
    torch.testing.assert_close(step.x_hat_BD, model.b_dec.detach().expand(3, D))


def test_decoder_rows_stay_unit_and_their_gradient_is_orthogonal() -> None:
    model = make()
    model(torch.randn(B, D), float(K), torch.arange(3), torch.tensor(1.0)).loss.backward()
    model.project_gradients()
    assert model.W_dec.grad is not None
    assert float((model.W_dec.grad * model.W_dec.detach()).sum(1).abs().max()) < 1e-4
    with torch.no_grad():
        model.W_dec.add_(torch.randn_like(model.W_dec))
    model.after_step()
    torch.testing.assert_close(model.W_dec.norm(dim=1), torch.ones(F))
