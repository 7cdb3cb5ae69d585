"""Authorities and certificates for tests, made by the `openssl` command."""

from __future__ import annotations

import subprocess
from pathlib import Path

_NEW = ["openssl", "req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1"]


def run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)


def authority(folder: Path, name: str = "job") -> Path:
    """Its certificate; the key lies beside it."""
    found = folder / f"{name}.pem"
    run(
        *_NEW,
        "-x509",
        "-nodes",
        "-subj",
        f"/CN={name}",
        "-days",
        "2",
        "-keyout",
        f"{folder / name}.key",
        "-out",
        f"{found}",
    )
    return found


def certificate(folder: Path, name: str, by: Path, days: int = 2, password: str = "") -> dict[str, str]:
    """A `transport.tls` block. `days`: validity, from now; a negative one has passed."""
    key, request, found = (folder / f"{name}{end}" for end in (".key", ".csr", ".pem"))
    secret = ["-passout", f"pass:{password}"] if password else ["-nodes"]
    run(*_NEW, *secret, "-subj", f"/CN={name}", "-keyout", str(key), "-out", str(request))
    sign = ["openssl", "x509", "-req", "-in", str(request), "-CA", str(by), "-CAkey", str(by.with_suffix(".key"))]
    run(*sign, "-CAcreateserial", "-days", str(days), "-out", str(found))
    key.chmod(0o600)
    return {"certificate": str(found), "key": str(key), "authority": str(by)}
