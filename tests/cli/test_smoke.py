"""``just smoke`` passes on a sound server and fails on one that is not."""

from pathlib import Path

import pytest

from tests import smoke


def test_smoke_passes(capsys: pytest.CaptureFixture[str]) -> None:
    assert smoke.main() == 0, capsys.readouterr().out
    assert "smoke: all is well" in capsys.readouterr().out


def test_smoke_fails_where_the_server_does_not_start(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(smoke.SETTINGS, "LASTCALL_STREAMS_MAX", "0")
    assert smoke.main() == 1
    printed = capsys.readouterr().out
    assert "the server does not start" in printed
    assert "LASTCALL_STREAMS_MAX: '0' should be" in printed
    assert printed.endswith("smoke: failed\n")


def test_smoke_fails_where_the_log_complains(tmp_path: Path) -> None:
    for complaint in ('{"level": "error", "message": "broken"}', "Traceback (most recent call last):"):
        (tmp_path / "log").write_text('{"level": "info", "message": "serving"}\n' + complaint)
        with pytest.raises(smoke.SmokeError, match="the log complains"):
            smoke.read_log(tmp_path / "log")
