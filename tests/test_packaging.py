"""What is shipped around the program keeps its promises: images, compose file, units of systemd.

They are read here. `make containers` runs the compose file.
"""

from __future__ import annotations

import inspect
import json
import re
import shutil
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path
from typing import Any, Final

import pytest
import yaml

from tests.test_documents import ROOT, tables
from walstream import config, errors
from walstream.errors import EX_TEMPFAIL, WalstreamError

COMPOSE: Final[dict[str, Any]] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
SERVICES: Final[dict[str, Any]] = COMPOSE["services"]
UNITS: Final = [ROOT / "deploy" / name for name in ("walstream.service", "walstream@.service")]
DRAIN_SECONDS: Final = config.StreamConfig().drain_seconds
EXPOSURE: Final = 20
"""2.0 of 10, as systemd-analyze counts."""

every_service = pytest.mark.parametrize("name", SERVICES)
every_unit = pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.name)


def seconds(text: str) -> int:
    """Read a duration of the compose file or a unit."""
    return int(re.fullmatch(r"(\d+)s", text)[1])  # type: ignore[index]


# ---- The images


@pytest.mark.parametrize(
    ("dockerfile", "bases"),
    [
        ("Dockerfile", {"python:3.13-slim"}),
        ("docker/postgres/Dockerfile", {"postgres:17"}),
    ],
)
def test_images_are_official_ones_extended_and_not_root(dockerfile: str, bases: set[str]) -> None:
    text = (ROOT / dockerfile).read_text()
    assert set(re.findall(r"^FROM (\S+)", text, re.MULTILINE)) == bases
    last_user = re.findall(r"^USER (\S+)", text, re.MULTILINE)[-1]
    assert last_user.partition(":")[0] not in ("root", "0")


def test_the_image_is_of_this_version_and_of_the_lock_file() -> None:
    text = (ROOT / "Dockerfile").read_text()
    assert f'image.version="{metadata.version("walstream")}"' in text
    assert "--require-hashes --requirement requirements.lock" in text
    installs = re.findall(r"pip\S* (?:--python \S+ )?install.*", text)
    assert len(installs) == 2
    assert all("--no-index" in install for install in installs)


def test_the_lock_file_names_no_index() -> None:
    text = (ROOT / "requirements.lock").read_text()
    assert not re.search(
        r"^\s*(-i|--(extra-)?index-url|--find-links)\b|https?://", text, re.MULTILINE
    )


def test_everything_that_the_image_copies_is_in_the_context_of_its_build() -> None:
    allowed = set(re.findall(r"^!(\S+)$", (ROOT / ".dockerignore").read_text(), re.MULTILINE))
    copies = re.findall(
        r"^COPY (?!--from)(.*) \S+$", (ROOT / "Dockerfile").read_text(), re.MULTILINE
    )
    sources = {source for copy in copies for source in copy.split()}
    assert sources
    for source in sources:
        assert (ROOT / source).exists()
        assert source.split("/")[0] in allowed


def test_the_health_check_asks_for_what_there_is() -> None:
    """Run as in the image; what answers is tests/test_gateway.py's."""
    script = ROOT / "docker/walstream/healthy"
    asked = subprocess.run(
        [sys.executable, script, "live"],
        env={"WALSTREAM_HTTP_LISTEN": "0.0.0.0:1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (asked.returncode, asked.stdout) == (1, "")
    assert asked.stderr.startswith("no answer")


# ---- The compose file


@every_service
def test_containers_are_confined(name: str) -> None:
    service = SERVICES[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert "privileged" not in service
    assert "user" not in service, "the image says it"


@every_service
def test_ports_are_of_this_machine_only(name: str) -> None:
    assert all(port.startswith("127.0.0.1:") for port in SERVICES[name].get("ports", []))


def test_without_a_profile_there_are_postgres_and_walstream() -> None:
    profiles = {name: service.get("profiles", []) for name, service in SERVICES.items()}
    assert {name for name, of in profiles.items() if not of} == {"postgres", "walstream"}
    assert {name for name, of in profiles.items() if of == ["demo"]} == {
        *("writer", "webhook", "receiver"),
    }
    assert {name for name, of in profiles.items() if of == ["observability"]} == {
        *("prometheus", "grafana"),
    }


@every_service
def test_what_containers_mount_is_there(name: str) -> None:
    for volume in SERVICES[name].get("volumes", []):
        source, target, *mode = volume.split(":")
        if source.startswith("."):
            assert (ROOT / source).exists(), volume
            assert mode == ["ro"], volume
        else:
            assert source in COMPOSE["volumes"], volume
            assert target.startswith("/"), volume


@pytest.mark.parametrize("name", ["walstream", "webhook"])
def test_walstream_drains_before_it_is_killed_and_is_healthy_when_ready(name: str) -> None:
    assert seconds(SERVICES[name]["stop_grace_period"]) >= DRAIN_SECONDS + 5
    assert SERVICES[name]["healthcheck"]["test"] == ["CMD", "healthy", "ready"]
    assert SERVICES[name]["depends_on"]["postgres"] == {"condition": "service_healthy"}


def test_the_configurations_of_the_demo_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WALSTREAM_SLOT_NAME", raising=False)
    files = sorted((ROOT / "docker").glob("*/*.toml"))
    slots = {file.stem: config.load(file).slot.name for file in files}
    # The default name is left to those who try things out on this server.
    assert slots == {
        "console": "walstream_console",
        "webhook": "walstream_webhook",
        "walstream": "walstream",
    }
    receiver = config.load(ROOT / "docker/demo/webhook.toml").sinks["receiver"]
    assert isinstance(receiver, config.WebhookSinkConfig)
    port = SERVICES["receiver"]["entrypoint"][-1]
    assert receiver.url.get_secret_value() == f"http://receiver:{port}/"


# ---- Prometheus and Grafana


def test_prometheus_reads_the_alerts_and_finds_walstream() -> None:
    folder = ROOT / "deploy/prometheus"
    content = yaml.safe_load((folder / "prometheus.yml").read_text())
    for name in content["rule_files"]:
        assert yaml.safe_load((folder / name).read_text())["groups"]
    [job, _] = content["scrape_configs"]
    [target] = job["static_configs"][0]["targets"]
    host, _, port = target.partition(":")
    assert SERVICES[host]["ports"] == [f"127.0.0.1:${{WALSTREAM_PORT:-{port}}}:{port}"]


def test_grafana_finds_the_dashboard_and_prometheus() -> None:
    folder = ROOT / "deploy/grafana"
    [source] = yaml.safe_load((folder / "provisioning/datasources/prometheus.yml").read_text())[
        "datasources"
    ]
    assert source["url"] == "http://prometheus:9090"
    [provider] = yaml.safe_load((folder / "provisioning/dashboards/walstream.yml").read_text())[
        "providers"
    ]
    mounted = dict(volume.split(":")[:2] for volume in SERVICES["grafana"]["volumes"])
    assert mounted["./deploy/grafana/dashboards"] == provider["options"]["path"]
    assert json.loads((folder / "dashboards/walstream.json").read_text())["panels"]


# ---- systemd


def settings_of(unit: Path) -> dict[str, list[str]]:
    """The values of each key, in their order."""
    found: dict[str, list[str]] = {}
    for line in unit.read_text().splitlines():
        key, separator, value = line.partition("=")
        if separator and not line.startswith("#"):
            found.setdefault(key, []).append(value)
    return found


@every_unit
def test_the_unit_is_started_again_for_what_passes_and_for_nothing_else(unit: Path) -> None:
    settings = settings_of(unit)
    assert settings["Restart"] == ["on-failure"]
    prevented = {int(code) for code in settings["RestartPreventExitStatus"][0].split()}
    codes = {
        kind.exit_code
        for _, kind in inspect.getmembers(errors, inspect.isclass)
        if issubclass(kind, WalstreamError)
    }
    assert EX_TEMPFAIL in codes
    assert prevented >= codes - {EX_TEMPFAIL}
    assert EX_TEMPFAIL not in prevented
    told = tables("docs/logging-and-exit-codes.md", "code", "meaning", "who acts")
    again = {int(number): row[3].startswith("yes") for row in told for number in row[0].split(",")}
    assert prevented | {0, 130, 143} == {code for code, is_again in again.items() if not is_again}
    assert settings["SuccessExitStatus"] == ["130 143"]


@every_unit
def test_the_unit_waits_for_the_stream_and_for_its_end(unit: Path) -> None:
    settings = settings_of(unit)
    assert settings["Type"] == ["notify"]
    assert settings["NotifyAccess"] == ["main"]
    assert settings["TimeoutStartSec"] == ["infinity"]
    assert seconds(settings["TimeoutStopSec"][0]) >= DRAIN_SECONDS + 10
    assert seconds(settings["WatchdogSec"][0]) > 0
    assert settings["ExecReload"] == ["/bin/kill -HUP $MAINPID"]


def test_the_template_is_the_unit_with_names() -> None:
    [unit, template] = [unit.read_text() for unit in UNITS]
    for plain, with_name in [
        ("of a PostgreSQL database", "of the PostgreSQL database %i"),
        ("/etc/walstream/walstream.toml", "/etc/walstream/%i.toml"),
        ("/etc/walstream/dsn", "/etc/walstream/%i.dsn"),
    ]:
        unit = unit.replace(plain, with_name)
    unit = re.sub(r"(StateDirectory=|%S/|/var/lib/)walstream", r"\1walstream-%i", unit)
    assert unit[unit.index("[Unit]") :] == template[template.index("[Unit]") :]


@pytest.fixture
def analyze(tmp_path: Path) -> Path:
    """A folder for units that systemd-analyze is to look at."""
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed: apt-get install systemd")
    return tmp_path


@every_unit
def test_the_unit_is_hardened(unit: Path, analyze: Path) -> None:
    looked = run_analyze("security", "--offline=true", f"--threshold={EXPOSURE}", str(unit))
    if "offline" in looked.stderr:
        pytest.skip("this systemd-analyze has no --offline")
    assert looked.returncode == 0, looked.stdout + looked.stderr


@every_unit
def test_systemd_understands_the_unit(unit: Path, analyze: Path) -> None:
    """With a program in the place of walstream's, which need not be installed."""
    copy = analyze / unit.name.replace("@", "@billing")
    copy.write_text(unit.read_text().replace("/opt/walstream/bin/walstream", "/bin/true"))
    looked = run_analyze("verify", "--man=no", str(copy))
    assert (looked.returncode, looked.stderr) == (0, "")


def run_analyze(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["systemd-analyze", *arguments],  # noqa: S607 - where PATH has it
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
    )


# ---- The whole


def test_the_extra_for_services_is_all_that_a_service_can_need() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = set(project["optional-dependencies"])
    assert project["optional-dependencies"]["service"] == ["walstream[binary,http,webhook,tracing]"]
    assert extras == {"binary", "c", "http", "webhook", "tracing", "service", "testing"}
