"""A certificate authority for tests and small clusters: `cachefs pki`.

Whoever has an authority already (cert-manager, Vault, step-ca) uses that one: what a node needs is a certificate for
server and client whose subjectAltName is the node's name, its key, and the authority's certificate, all in PEM.

    DIR/ca.pem       the authority: goes to every node
    DIR/ca.key       its key: stays where certificates are made
    DIR/NODE.pem     a node's certificate
    DIR/NODE.key     and key: go to that node
"""

from __future__ import annotations

import datetime
import ipaddress
import os
import re
import secrets
from pathlib import Path
from typing import TYPE_CHECKING

from cachefs.errors import ConfigError

if TYPE_CHECKING:
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey

# Browsers refuse certificates of more than 825 days, and nobody renews what is valid for longer.
NODE_DAYS = 825
AUTHORITY_DAYS = 3650

# Nodes whose clocks are off still believe a new certificate.
EARLIER = datetime.timedelta(days=1)

# What a name of DNS may be: so are the names of Kubernetes and Slurm nodes.
_NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?(\.[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?)*", re.IGNORECASE)


def make_authority(folder: Path) -> Path:
    """A new authority in `folder`; the file of its certificate. Raises ConfigError when there is one."""
    certificate, key = folder / "ca.pem", folder / "ca.key"
    if certificate.exists() or key.exists():
        raise ConfigError(f"{folder}: has an authority already; the nodes trust that one")
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric import ec

    private = ec.generate_private_key(ec.SECP256R1())
    subject = _subject(f"cachefs cluster {secrets.token_hex(4)}")
    made = (
        _builder(subject, subject, private, AUTHORITY_DAYS)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(authority=True), critical=True)
    )
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    _write(key, _pem_key(private), 0o600)
    _write(certificate, _signed(made, private), 0o644)
    return certificate


def issue(folder: Path, name: str) -> tuple[Path, Path]:
    """A certificate for node `name` of the authority in `folder`: (certificate, key). It replaces an older one.

    Raises ConfigError when there is no authority, or the name is none that a certificate can have.
    """
    from cryptography import x509
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import ExtendedKeyUsageOID

    if len(name) > 253 or _NAME.fullmatch(name) is None:
        raise ConfigError(f"node name {name!r}: letters, digits and - in parts of at most 63, joined by dots")
    if name == "ca":
        raise ConfigError("node name 'ca': its files would be the authority's")
    try:
        authority = x509.load_pem_x509_certificate((folder / "ca.pem").read_bytes())
        signing = serialization.load_pem_private_key((folder / "ca.key").read_bytes(), None)
    except OSError as error:
        raise ConfigError(
            f"{folder}: has no authority ({error.strerror}); make one: cachefs pki init {folder}"
        ) from None
    except ValueError as error:
        raise ConfigError(f"{folder}: its authority cannot be read ({error})") from None
    if not isinstance(signing, ec.EllipticCurvePrivateKey):
        raise ConfigError(f"{folder}/ca.key: was not made by cachefs pki")
    private = ec.generate_private_key(ec.SECP256R1())
    made = (
        _builder(_subject(name[:64]), authority.subject, private, NODE_DAYS)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(authority=False), critical=True)
        .add_extension(x509.SubjectAlternativeName([_alternative(name)]), critical=False)
        .add_extension(
            x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]), critical=False
        )
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signing.public_key()), critical=False)
    )
    certificate, key = folder / f"{name}.pem", folder / f"{name}.key"
    _write(key, _pem_key(private), 0o600)
    _write(certificate, _signed(made, signing), 0o644)
    return certificate, key


def _alternative(name: str) -> x509.GeneralName:
    """Of a node that is called by its address, as lists of addresses call it, the address."""
    from cryptography import x509

    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def make_secret(file: Path) -> None:
    """A secret for `SecretTrust`, in a new file that only its owner may read. Raises ConfigError when there is one."""
    if file.exists():
        raise ConfigError(f"{file}: is there already; the nodes share that one")
    file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    _write(file, secrets.token_hex(32).encode() + b"\n", 0o600)


def _subject(name: str) -> x509.Name:
    from cryptography import x509
    from cryptography.x509.oid import NameOID

    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _builder(
    subject: x509.Name, issuer: x509.Name, private: EllipticCurvePrivateKey, days: int
) -> x509.CertificateBuilder:
    from cryptography import x509

    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(private.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - EARLIER)
        .not_valid_after(now + datetime.timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(private.public_key()), critical=False)
    )


def _usage(*, authority: bool) -> x509.KeyUsage:
    from cryptography import x509

    return x509.KeyUsage(
        digital_signature=not authority,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=authority,
        crl_sign=authority,
        encipher_only=False,
        decipher_only=False,
    )


def _signed(builder: x509.CertificateBuilder, key: EllipticCurvePrivateKey) -> bytes:
    from cryptography.hazmat.primitives import hashes, serialization

    return builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def _pem_key(private: EllipticCurvePrivateKey) -> bytes:
    from cryptography.hazmat.primitives import serialization

    return private.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _write(file: Path, data: bytes, mode: int) -> None:
    """Complete or not at all, and never readable by more than `mode` says."""
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    temporary.unlink(missing_ok=True)
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    with os.fdopen(fd, "wb") as opened:
        opened.write(data)
    os.replace(temporary, file)
