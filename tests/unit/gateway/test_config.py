"""The configuration file: what is accepted, and how precisely the rest is refused."""

from pathlib import Path

import pytest

from services.gateway import config
from services.gateway.config import ConfigError

GOOD = """
pools:
  - name: ocr-cuda
    service: ocr
    hardware: cuda
    targets: ["dns:///ocr-cuda:50051"]
  - name: ocr-cpu
    service: ocr
    hardware: cpu
    targets: ["10.0.0.1:50051", "[fd00::1]:50051"]
defaults:
  ocr: [cpu, cuda]
"""


def test_a_whole_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "gateway.yaml"
    path.write_text(GOOD)
    read = config.load(path)
    assert [(p.name, p.service, p.hardware) for p in read.pools] == [
        ("ocr-cuda", "ocr", "cuda"),
        ("ocr-cpu", "ocr", "cpu"),
    ]
    assert read.defaults == {"ocr": ["cpu", "cuda"]}


@pytest.mark.parametrize(
    ("find", "put", "expected"),
    [
        ("hardware: cuda", "hardware: gpu", "pools[0].hardware: 'gpu' is not a hardware label; accepted: cuda, rocm,"),
        ("service: ocr", "service: ocrr", "pools[0].service: 'ocrr' is not a service; accepted: ocr, diffusion"),
        ("name: ocr-cpu", "nam: ocr-cpu", "pools[1].nam: there is no such key"),
        ("name: ocr-cpu", "nam: ocr-cpu", "pools[1].name: this key is required"),
        ("name: ocr-cpu", "name: ocr-cuda", "pools[1].name: 'ocr-cuda' is already pools[0]"),
        ("name: ocr-cpu", "name: OCR_cpu", "pools[1].name: string should match pattern"),
        ('["dns:///ocr-cuda:50051"]', "[]", "pools[0].targets: list should have at least 1 item"),
        ("dns:///ocr-cuda:50051", "ocr-cuda", "pools[0].targets[0]: 'ocr-cuda' is not a target; accepted: 'host:port'"),
        ("dns:///ocr-cuda:50051", "http://a:1", "pools[0].targets[0]: 'http://a:1' is not a target"),
        ("dns:///ocr-cuda:50051", "a:70000", "pools[0].targets[0]: port 70000 of 'a:70000' is not between 1 and 65535"),
        ("[fd00::1]:50051", "10.0.0.1:50051", "pools[1].targets: '10.0.0.1:50051' is listed more than once"),
        ("dns:///ocr-cuda:50051", "10.0.0.1:50051", "pools[1].targets[0]: '10.0.0.1:50051' is already in pool"),
        ("  ocr: [cpu, cuda]", "  ocr: [cpu, tpu]", "defaults.ocr[1]: 'tpu' is not a hardware label"),
        ("  ocr: [cpu, cuda]", "  ocr: [cpu, cpu]", "defaults.ocr: 'cpu' is listed more than once"),
        ("  ocr: [cpu, cuda]", "  oc: [cpu]", "'oc' is not a service"),
        ("defaults:", "default:", "default: there is no such key"),
        ("  ocr: [cpu, cuda]", "  ocr: [cpu]\n  ocr: [cuda]", "key 'ocr' is given twice"),
        ("pools:", "pools: [", "not valid YAML"),
    ],
)
def test_a_wrong_key_is_named_with_what_is_accepted(find: str, put: str, expected: str) -> None:
    with pytest.raises(ConfigError) as refused:
        config.parse(GOOD.replace(find, put, 1), name="gateway.yaml")
    assert str(refused.value).startswith("gateway.yaml: ")
    assert expected in str(refused.value)


POOL = "pools: [{{name: ocr-{hardware}, service: ocr, hardware: {hardware}, targets: ['ocr-{hardware}:50051']}}]\n"


def test_the_files_of_a_folder_are_one_configuration(tmp_path: Path) -> None:
    (tmp_path / "30-cpu.yaml").write_text(POOL.format(hardware="cpu") + "defaults: {ocr: [cpu]}")
    (tmp_path / "10-cuda.yaml").write_text(POOL.format(hardware="cuda") + "defaults: {diffusion: [cuda]}")
    (tmp_path / "50-nothing.yaml").write_text("# routes may come here\n")
    (tmp_path / "notes.txt").write_text("not of it")
    read = config.load(tmp_path)
    assert [pool.name for pool in read.pools] == ["ocr-cuda", "ocr-cpu"]
    assert read.defaults == {"ocr": ["cpu"], "diffusion": ["cuda"]}


@pytest.mark.parametrize(
    ("second", "expected"),
    [
        (POOL.format(hardware="cuda"), "pools[1].name: 'ocr-cuda' is already pools[0]"),
        ("pools: {ocr: 1}", "pools: said in two files"),
        ("defaults: {ocr: [cpu]}", "defaults: said in two files"),
        ("[]", "expected a mapping"),
    ],
)
def test_files_that_do_not_go_together_are_refused(tmp_path: Path, second: str, expected: str) -> None:
    (tmp_path / "1.yaml").write_text(POOL.format(hardware="cuda") + "defaults: {ocr: [cuda]}")
    (tmp_path / "2.yaml").write_text(second)
    with pytest.raises(ConfigError) as refused:
        config.load(tmp_path)
    assert expected in str(refused.value)


@pytest.mark.parametrize("text", ["", "[]", "pools", "pools: []", "pools: 3"])
def test_a_file_without_pools_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="pools"):
        config.parse(text)


def test_yaml_cannot_make_python_objects() -> None:
    with pytest.raises(ConfigError, match="not valid YAML"):
        config.parse("pools: !!python/object/apply:os.getcwd []")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.yaml: cannot be read"):
        config.load(tmp_path / "nowhere.yaml")


@pytest.mark.parametrize(
    ("text", "host", "port", "resolve", "address"),
    [
        ("dns:///ocr.svc.cluster.local:50051", "ocr.svc.cluster.local", 50051, True, "ocr.svc.cluster.local:50051"),
        ("127.0.0.1:1", "127.0.0.1", 1, False, "127.0.0.1:1"),
        ("[::1]:65535", "::1", 65535, False, "[::1]:65535"),
    ],
)
def test_targets(text: str, host: str, port: int, resolve: bool, address: str) -> None:
    target = config.parse_target(text)
    assert (target.host, target.port, target.resolve, target.address) == (host, port, resolve, address)
