"""Convolutional front-ends: shapes of any image, and models that use them."""

from __future__ import annotations

import pytest
import torch

from dynavae import DKF, KVAE, VAE, VRNN, fit, score
from dynavae.nn import Bernoulli, ConvEmissionHead, ConvEncoder, Gaussian
from dynavae.testing import law_fast_equals_slow, law_unseen, small
from dynavae.training import calibrate


@pytest.mark.parametrize("image", [(8, 8), (7, 5), (1, 3), (2, 6, 4)])
@pytest.mark.parametrize("depth", [1, 3])
def test_any_image_goes_in_and_comes_out(image, depth):
    x_dim = torch.Size(image).numel()
    encoder = ConvEncoder(x_dim, x_dim, (4,) * depth, image)
    assert encoder(torch.randn(2, 3, x_dim)).shape == (2, 3, encoder.out_dim)
    for emission, numbers in ((Bernoulli(), 1), (Gaussian(), 2)):
        head = ConvEmissionHead(emission, 5, x_dim, (8,) * depth, image)
        p = head(torch.randn(2, 3, 5))
        assert p.mean.shape == (2, 3, x_dim) and len(head.bias) == numbers * x_dim


def test_a_mask_is_a_plane_and_controls_pass_by():
    encoder = ConvEncoder(2 * 16 + 3, 16, (4,), (4, 4))
    assert encoder.net[0].in_channels == 2
    frame = torch.randn(5, 35)
    assert torch.equal(encoder(frame)[:, -3:], frame[:, -3:])


def test_features_see_where_a_pixel_is():
    """Moving the input by two pixels moves the features by one."""
    torch.manual_seed(0)
    encoder = ConvEncoder(256, 256, (3,), (16, 16))
    x = torch.zeros(16, 16)
    x[6, 6] = 1.0
    a, b = (encoder(v.reshape(1, -1)).reshape(3, 8, 8) for v in (x, x.roll((2, 2), (0, 1))))
    torch.testing.assert_close(a.roll((1, 1), (1, 2)), b)


def test_the_bias_of_each_pixel_starts_at_the_data():
    x = torch.zeros(10, 4, 16)
    x[..., 3] = 1.0
    model = VAE(x_dim=16, z_dim=2, image=(4, 4), layers=(4,), emission="bernoulli")
    assert calibrate(model, x)
    assert (model.p_x.bias[3] > 5) and (model.p_x.bias[:3] < -5).all()


OPTIONS = {
    VAE: {"layers": (8,)},
    DKF: {"x_layers": (4,), "decoder_layers": (8,)},
    VRNN: {"x_layers": (4,), "decoder_layers": (8,)},
    KVAE: {"layers": (8,)},
}


@pytest.mark.parametrize("kind", OPTIONS)
def test_models_with_convolutions_keep_the_laws_and_learn(kind):
    options = dict(OPTIONS[kind], image=(2, 2), emission="bernoulli")
    law_fast_equals_slow(lambda: small(kind, **options))
    law_unseen(lambda: small(kind, **options))
    torch.manual_seed(0)
    x = torch.zeros(16, 6, 4)
    x[torch.arange(16)[:, None], torch.arange(6), (torch.arange(16)[:, None] + torch.arange(6)) % 4] = 1.0
    model = kind(x_dim=4, z_dim=2, **options)
    before = score(model, x).nats_per_frame
    fit(model, x, epochs=30, batch_size=8, lr=0.02, progress=False, accelerator="cpu", calibrate=False)
    assert score(model, x).nats_per_frame < before - 0.2


def test_convolutions_refuse_a_norm():
    with pytest.raises(ValueError, match="convolutions take norm=None; got 'layer'"):
        VAE(x_dim=4, image=(2, 2), layers=(8,), norm="layer")
