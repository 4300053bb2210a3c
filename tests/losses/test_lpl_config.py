"""Presets, and refusal of what cannot be meant."""

import dataclasses
import math

import pytest

from lpl_jax.errors import InputError
from lpl_jax.losses import LPLConfig


def test_presets_differ_where_the_two_readings_do():
    paper, reference = (dataclasses.asdict(LPLConfig.preset(name)) for name in ("paper", "reference"))
    same = {name: value for name, value in paper.items() if reference[name] == value}
    assert same == dict(
        extra_weight="none",
        taps="all",
        norm_eps=1e-6,
        mask_layers="deep",
        quantile=0.02,
        quantile_method="auto",
        opening=5,
        closing=3,
        metric="mse",
        spatial="mean",
    )


def test_a_new_weight_replaces_the_share_of_the_preset():
    assert LPLConfig.paper(weight=3.0).target_share is None
    assert LPLConfig.reference(target_share=0.1).weight is None


def test_lists_become_hashable():
    assert hash(LPLConfig.paper(mask_layers=[2, 3])) == hash(LPLConfig.paper(mask_layers=(2, 3)))


def test_tau_scales_with_the_side():
    config = LPLConfig.paper(tau=4.0, tau_ref_resolution=512)
    assert config.tau_at(256) == 2.0 and config.tau_at(1024) == 8.0


def test_kernels_by_map_and_by_tap():
    paper, reference = LPLConfig.paper(), LPLConfig.reference()
    assert [paper.kernels(tap, size) for tap, size in ((2, 256), (3, 512), (4, 512))] == [(1, 3), (3, 5), (3, 5)]
    assert [paper.kernels(tap, size) for tap, size in ((2, 128), (3, 256), (4, 256))] == [(1, 3)] * 3
    assert [reference.kernels(tap, 64) for tap in (2, 3, 4)] == [(1, 3), (3, 5), (3, 5)]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (dict(tau=4.0), ["lpl.tau=4.0", "tau_ref_resolution"]),
        (dict(tau_ref_resolution=512, tau=None), ["tau_ref_resolution=512", "without tau"]),
        (dict(tau=0.0, tau_ref_resolution=512), ["lpl.tau=0.0", "above 0"]),
        (dict(tau=math.nan, tau_ref_resolution=512), ["lpl.tau=nan", "above 0"]),
        (dict(tau_ref_resolution=-1, tau=3.0), ["tau_ref_resolution=-1"]),
        (dict(taps=0), ["lpl.taps=0", "all, rgb, or 1 to 64"]),
        (dict(taps="pixels"), ["lpl.taps='pixels'"]),
        (dict(taps=True), ["lpl.taps=True"]),
        (dict(stats="shared"), ["lpl.stats='shared'", "predicted, clean, separate, none"]),
        (dict(norm="batch"), ["lpl.norm='batch'", "channel_std"]),
        (dict(mask_on="both"), ["lpl.mask_on='both'"]),
        (dict(mask_layers="some"), ["lpl.mask_layers='some'", "deep, all, none, or tap numbers"]),
        (dict(mask_layers=(2, -1)), ["lpl.mask_layers=(2, -1)", "0 to 63"]),
        (dict(mask_layers=(2, 3), taps=3), ["lpl.mask_layers=(2, 3)", "0 to 2"]),
        (dict(mask_layers=(0,), taps="rgb"), ["taps='rgb'"]),
        (dict(quantile=0.7), ["lpl.quantile=0.7"]),
        (dict(opening=4), ["lpl.opening=4", "odd"]),
        (dict(closing=2), ["lpl.closing=2", "odd"]),
        (dict(omega="linear"), ["lpl.omega='linear'"]),
        (dict(batch="mean"), ["lpl.batch='mean'", "all, active"]),
        (dict(metric="l2"), ["lpl.metric='l2'"]),
        (dict(stats_grad="false"), ["lpl.stats_grad='false'", "True or False"]),
        (dict(norm_eps=0.0), ["lpl.norm_eps=0.0"]),
        (dict(stats="clean"), ["lpl.stats_grad=True", "stats='clean'", "stats_grad=False"]),
        (dict(mask_zero_input=True), ["lpl.mask_zero_input=True", "norm='channel_std'"]),
        (dict(weight=1.0, target_share=0.2), ["lpl.weight=1.0", "lpl.target_share=0.2", "one of the two"]),
        (dict(weight=-1.0), ["lpl.weight=-1.0"]),
        (dict(target_share=1.0), ["lpl.target_share=1.0"]),
        (dict(nrom="channel_std"), ["lpl.nrom", "did you mean norm?"]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_refusals_name_the_field_and_what_is_possible(fields, words):
    with pytest.raises(InputError) as error:
        LPLConfig.paper(**fields)
    for word in words:
        assert word in str(error.value)
    assert "\n" not in str(error.value)


def test_tau_without_unit_is_refused_by_the_constructor_too():
    with pytest.raises(InputError, match="no unit"):
        LPLConfig(tau=3.0)


def test_unknown_preset():
    with pytest.raises(InputError, match="lpl.preset='original' is not possible: it must be none, paper, reference"):
        LPLConfig.preset("original")
