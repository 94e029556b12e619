"""Secrets in addresses: what signs or authorises a request is used to fetch, never stored or shown.

`clean` gives the address that a source is known by: the same object signed anew is the same source. The table
below says which query parameters go; to add one, add its name.
"""

from __future__ import annotations

import re
import urllib.parse
from functools import cache

# Parameters that authorise, whoever reads them (whole names, any letter case).
SECRETS = {
    "AWS, signature version 4": r"x-amz-.*",
    "AWS, signature version 2; CloudFront": r"awsaccesskeyid|key-pair-id|signature",
    "Google Cloud Storage": r"x-goog-.*|googleaccessid",
    "Azure SAS": r"sig",
    "Alibaba OSS": r"x-oss-.*|ossaccesskeyid|security-token",
    "Tencent COS": r"q-sign-.*|q-ak|q-key-time|q-header-list|q-url-param-list|q-signature|x-cos-security-token",
    "Akamai": r"hdnea|hdnts|hdntl|__token__|__gda__",
    "tokens": r"(access|auth|api|id|refresh|session|bearer|sas|user|download|secure)?[-_]?token|jwt",
    "keys and passwords": r"auth|auth[-_]?key|authorization|api[-_]?key|access[-_]?key|secret[-_]?key|"
    r"client[-_]?secret|secret|pass|passwd|password|pwd",
}
# Parameters that mean something else elsewhere: they go where the first pattern finds a name too.
WITH = {
    r"signature|key-pair-id": r"expires|policy|hash-algorithm",  # CloudFront; AWS and Google of old
    r"sig": r"s[vrpest]|ss|srt|spr|sip|sdd|ses|sk(oid|tid|t|e|s|v)|saoid|suoid|scid",  # Azure SAS
    r"md5": r"md5|expires",  # nginx secure_link
    r".*token.*|auth.*|hdn.*": r"expires?|expiry|exp",
}
OPTIONS = r"access_key|secret_key|session_token|proxy_options"  # pyarrow's, of an s3:// uri
IN_PATH = re.compile(r"/(?:hdn\w+|exp|st)=[^?#]*?~hmac=[^/?#]*", re.I)  # Akamai's tokens as folders

_PARTS = re.compile(r"([a-z][a-z0-9+.-]*)://([^/?#]*)([^?#]*)(\?[^#]*)?(#.*)?", re.I | re.S)
_IN_TEXT = re.compile(r"[a-z][a-z0-9+.-]*://[^\s\"'<>\\]+", re.I)
_OBJECT = re.compile(r"(s3|gs|gcs)://", re.I)


def clean(address: str) -> str:
    """The address without its secrets; anything else (a path) as it is."""
    return _parted(address)[0] if "://" in address else address


def clean_text(text: str) -> str:
    """A text with every address in it clean."""
    return _IN_TEXT.sub(lambda found: clean(found[0]), text) if "://" in text else text


def redacted(text: str, address: str | None) -> str:
    """What somebody says of `address` without its secrets."""
    if address is None:
        return clean_text(text)
    public, secrets = _parted(address)
    text = text.replace(address, public)
    for secret in sorted(secrets, key=len, reverse=True):
        text = text.replace(secret, "…")
    return clean_text(text)


def split_options(place: str) -> tuple[str, str]:
    """'bucket/key?region=x' → ('bucket/key', '?region=x'); a '?' without 'name=' belongs to the key."""
    found = re.search(r"\?[a-z_]+=.*$", place, re.S)
    return (place[: found.start()], found.group()) if found else (place, "")


@cache
def _secret() -> re.Pattern[str]:
    return re.compile("|".join(f"(?:{names})" for names in SECRETS.values()), re.I)


def _kept(query: str, secret: re.Pattern[str], secrets: set[str]) -> str:
    """'a=1&token=x' → 'a=1'; the values of the others go to `secrets`."""
    pairs = [(re.split("=", p, maxsplit=1), p) for p in query.split("&")]
    names = [urllib.parse.unquote_plus(parts[0]) for parts, _ in pairs]
    gone = {n for n in names if secret.fullmatch(n)}
    for witness, others in WITH.items() if secret is _secret() else ():
        if any(re.fullmatch(witness, n, re.I) for n in names):
            if witness == "md5" and not any(n.lower() == "expires" for n in names):
                continue  # just a check sum
            gone |= {n for n in names if re.fullmatch(others, n, re.I)}
    for (parts, _), name in zip(pairs, names, strict=True):
        if name in gone and len(parts) == 2:
            _note(secrets, parts[1])
    return "&".join(p for (_, p), name in zip(pairs, names, strict=True) if name not in gone)


def _note(secrets: set[str], value: str) -> None:
    """Remember a value as it stands and as it reads, and its parts; short ones would hit innocent words."""
    for v in (value, urllib.parse.unquote(value), urllib.parse.unquote_plus(value)):
        secrets |= {part for part in (v, *re.split("[~=:&/%]", v)) if len(part) > 5}


@cache
def _options() -> re.Pattern[str]:
    return re.compile(OPTIONS, re.I)


def _parted(address: str) -> tuple[str, set[str]]:
    """The clean address, and the secrets that were in it."""
    secrets: set[str] = set()
    if _OBJECT.match(address):
        scheme, rest = address.split("://", 1)
        place, options = split_options(rest)
        bucket, slash, key = place.partition("/")
        options = _kept(options[1:], _options(), secrets)
        host = _host(bucket, secrets)
        return f"{scheme}://{host}{slash}{key}" + (f"?{options}" if options else ""), secrets
    found = _PARTS.fullmatch(address)
    if found is None:
        return address, secrets
    scheme, netloc, path, query, fragment = (part or "" for part in found.groups())
    host = _host(netloc, secrets)
    for token in IN_PATH.findall(path):
        _note(secrets, token[1:])
    path = IN_PATH.sub("", path)
    query = _kept(query[1:], _secret(), secrets)
    if "=" in fragment:
        kept = _kept(fragment[1:], _secret(), secrets)
        fragment = f"#{kept}" if kept else ""
    return f"{scheme}://{host}{path}" + (f"?{query}" if query else "") + fragment, secrets


def _host(netloc: str, secrets: set[str]) -> str:
    """'host:80' of 'user:password@host:80'."""
    user, _, host = netloc.rpartition("@")
    for part in user.split(":")[1:] or [user]:
        _note(secrets, part)
    return host
