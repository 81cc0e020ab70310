"""Certificates and node keys for a deployment on this machine; not for a real one."""

from __future__ import annotations

import datetime
import ipaddress
from pathlib import Path
from typing import NamedTuple

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from cryptography.x509.oid import NameOID

__all__ = ["ServerFiles", "make_node_key", "make_server_certificate"]

_LIFETIME = datetime.timedelta(days=2)


class ServerFiles(NamedTuple):
    """Files in PEM: the certificate of the authority, and certificate and private key of the server."""

    authority: Path
    certificate: Path
    key: Path


def make_server_certificate(folder: Path) -> ServerFiles:
    """Make an authority, and have it certify a server at 127.0.0.1; two days long.

    Files that are there already are kept: a server that is started anew must be known to those that knew it.
    """
    files = ServerFiles(folder / "ca.pem", folder / "server.pem", folder / "server.key")
    if all(file.exists() for file in files):
        return files
    issuer_key, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    issuer = _certificate("fedmoe-sched loopback authority", issuer_key, None, issuer_key)
    certificate = _certificate("127.0.0.1", key, issuer, issuer_key)
    files.authority.write_bytes(issuer.public_bytes(Encoding.PEM))
    files.certificate.write_bytes(certificate.public_bytes(Encoding.PEM))
    _write_secret(files.key, key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    return files


def _certificate(
    name: str,
    key: ec.EllipticCurvePrivateKey,
    issuer: x509.Certificate | None,
    issuer_key: ec.EllipticCurvePrivateKey,
) -> x509.Certificate:
    """Certify a key; without an issuer as an authority, by itself."""
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.UTC)
    authority = x509.SubjectKeyIdentifier.from_public_key(issuer_key.public_key())
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject if issuer is None else issuer.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(minutes=5))
        .not_valid_after(now + _LIFETIME)
        .add_extension(x509.BasicConstraints(ca=issuer is None, path_length=None), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(authority), critical=False)
    )
    if issuer is not None:
        here = [x509.IPAddress(ipaddress.ip_address("127.0.0.1")), x509.DNSName("localhost")]
        builder = builder.add_extension(x509.SubjectAlternativeName(here), critical=False)
    return builder.sign(issuer_key, hashes.SHA256())


def make_node_key(path: Path) -> Path:
    """Make the key of a node, and return the file of its public part; what is there already is kept."""
    public = path.with_name(f"{path.name}.pub")
    if not (path.exists() and public.exists()):
        key = ec.generate_private_key(ec.SECP384R1())
        _write_secret(path, key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()))
        public.write_bytes(key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH))
    return public


def _write_secret(path: Path, content: bytes) -> None:
    path.touch(mode=0o600)
    path.write_bytes(content)
