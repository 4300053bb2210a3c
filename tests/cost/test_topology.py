"""Names of machines to compile for."""

import pytest

from lpl_jax.cost import topology
from lpl_jax.errors import InputError


@pytest.mark.parametrize(
    "given, name, devices, text",
    [
        ("v5e:4x4", "v5e:4x4", 16, "v5e:4x4: 16 v5e chips"),
        ("v5e-16", "v5e:4x4", 16, "v5e-16 = v5e:4x4: 16 v5e chips"),
        ("v5e-256", "v5e:16x16", 256, "256 v5e chips"),
        ("v6e-16", "v6e:4x4", 16, "16 v6e chips"),
        ("v5p-16", "v5p:2x2x2", 8, "8 v5p chips (the name counts TensorCores, 2 in each chip)"),
        ("v5p:2x2x4", "v5p:2x2x4", 16, "16 v5p chips"),
        ("cpu:8", "cpu:8", 8, "8 devices emulated on this CPU"),
    ],
)
def test_names(given, name, devices, text):
    found = topology.parse(given)
    assert (found.name, found.devices) == (name, devices) and text in found.text
    assert (found.hbm is None) == (found.platform == "cpu")


@pytest.mark.parametrize(
    "given, message",
    [
        ("v7:2x2", "possible: cpu:N, or v4, v5e, v5p, v6e"),
        ("v5e:4x4x4", "a slice of v5e is A x B chips"),
        ("v5p:4x4", "a slice of v5p is A x B x C chips"),
        ("v5e-17", "v5e-1, v5e-4, v5e-8, v5e-16"),
        ("v5p-4", "v5p-8, v5p-16"),
        ("cpu:0", "possible are 1 to 1,024 emulated devices"),
        ("cpu:99999999", "possible are 1 to 1,024 emulated devices"),
        ("v5e:9999x9999", "at most 64 chips along an axis"),
        ("nonsense", "'nonsense' is not known"),
    ],
)
def test_mistakes(given, message):
    with pytest.raises(InputError, match=message):
        topology.parse(given)


def test_environment_replaces_the_number_of_devices_alone(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=2 --xla_dump_to=there")
    flags = topology.environment(topology.parse("cpu:3"))["XLA_FLAGS"].split()
    assert flags == ["--xla_dump_to=there", "--xla_force_host_platform_device_count=3"]


def test_libtpu_is_not_given_flags_of_other_devices(monkeypatch):
    monkeypatch.setenv(
        "XLA_FLAGS", "--xla_cpu_use_fusion_emitters=false --xla_dump_to=there --xla_gpu_autotune_level=0"
    )
    assert topology.environment(topology.parse("v5e-16"))["XLA_FLAGS"] == "--xla_dump_to=there"


def test_without_libtpu(monkeypatch):
    monkeypatch.setattr(topology, "has_libtpu", lambda: False)
    with pytest.raises(InputError, match="pip install"):
        topology.devices(topology.parse("v5e-16"))


def test_a_wrong_path_to_libtpu_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("TPU_LIBRARY_PATH", str(tmp_path / "libtpu.so"))
    with pytest.raises(InputError, match="libtpu.so: there is no such file"):
        topology.devices(topology.parse("v5e-16"))
