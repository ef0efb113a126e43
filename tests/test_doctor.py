"""`openvision doctor`: what it finds, and that it names what is wrong."""

import os
from collections import namedtuple
from email.message import Message
from pathlib import Path

import pytest
from typer.testing import CliRunner

from openvision import doctor
from openvision.cli.main import app
from openvision.errors import OpenVisionError

Usage = namedtuple("Usage", "total used free")


def found(topic: str, **options) -> list[doctor.Finding]:
    return [one for one in doctor.examine(Path(), **options) if one.topic == topic]


def test_a_sound_machine_has_no_problems(monkeypatch):
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: Usage(0, 0, 100 * doctor.GIB))
    findings = list(doctor.examine(Path(), "cpu"))
    assert [one for one in findings if one.state == "problem"] == []
    assert {"python", "torch", "device", "cores", "images", "disk", "open files"} <= {one.topic for one in findings}


def test_a_device_that_is_not_there():
    (finding,) = found("device", device="cuda:7")
    assert finding.state == "problem"
    assert "is not there" in finding.text


@pytest.mark.parametrize(("free", "states"), [(doctor.GIB // 8, ("note", "problem")), (64 * doctor.GIB, ("ok", "ok"))])
def test_little_room_is_told(monkeypatch, tmp_path, free, states):
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: Usage(0, 0, free))
    (disk,) = doctor._disk(tmp_path / "runs/not/there/yet")
    (shared,) = doctor._shared_memory(tmp_path)
    assert (disk.state, shared.state) == states
    assert str(tmp_path) in disk.text


def test_few_open_files_are_told(monkeypatch):
    import resource

    monkeypatch.setattr(resource, "getrlimit", lambda kind: (256, 4096))
    (finding,) = doctor._open_files()
    assert (finding.state, "ulimit -n" in finding.text) == ("note", True)


def test_a_decoder_that_is_missing_is_named(monkeypatch):
    decode = doctor.decode_image

    def without_webp(data: bytes):
        if data[8:12] == b"WEBP":
            raise doctor.BadSampleError("undecodable", "no WebP here")
        return decode(data)

    monkeypatch.setattr(doctor, "decode_image", without_webp)
    (finding,) = doctor._decoders()
    assert finding.state == "note"
    assert "cannot read WEBP" in finding.text


def test_a_torchvision_of_another_torch(monkeypatch):
    versions = {"torch": "2.13.0", "torchvision": "0.27.1"}
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(doctor.importlib.metadata, "version", versions.get)
    assert [one.text for one in doctor._torchvision()] == ["0.27 does not fit torch 2.13: install 0.28"]
    versions["torchvision"] = "0.28.0"
    assert list(doctor._torchvision()) == []


def test_extras_that_are_absent_are_named(monkeypatch):
    metadata = Message()
    for extra, package in {"search": "faiss-cpu>=1.8", "onnx": "onnx>=1", "dev": "pytest"}.items():
        metadata["Provides-Extra"] = extra
        metadata["Requires-Dist"] = f'{package}; extra == "{extra}"'
    monkeypatch.setattr(doctor.importlib.metadata, "metadata", lambda name: metadata)
    monkeypatch.setattr(doctor, "_is_installed", lambda name: name != "faiss-cpu")
    there, absent = doctor._extras()
    assert "search (search among millions)" in absent.text
    assert "onnx (export to ONNX)" in there.text
    assert "search" not in there.text
    assert "dev" not in there.text + absent.text


def test_idle_cores_are_told(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2})
    (finding,) = found("threads", device="cpu")
    assert "leaves 2 of 3 cores idle" in finding.text


def test_the_command_fails_where_something_will(monkeypatch):
    monkeypatch.setattr(
        doctor, "examine", lambda folder, device: iter([doctor.Finding("disk", "problem", "it is full")])
    )
    done = CliRunner().invoke(app, ["doctor"])
    assert "problem  disk           it is full" in done.output
    assert isinstance(done.exception, OpenVisionError)
    monkeypatch.setattr(doctor, "examine", lambda folder, device: iter([doctor.Finding("disk", "ok", "empty")]))
    assert CliRunner().invoke(app, ["doctor"]).exit_code == 0
