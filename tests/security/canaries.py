"""Secrets as vendors shape them, made up here, and the search for what is left of them."""

from __future__ import annotations

from pathlib import Path

SHAPES = {
    "huggingface": "hf_CANARYabcdefghijklmnopqrstuvwx01",
    "wandb": "wandb_v1_CANARYabcdefghijklmnopqrst01",
    "openai": "sk-proj-CANARYabcdefghijklmnop0123456789",
    "anthropic": "sk-ant-api03-CANARY0123456789abcdefghij-AA",
    "stripe": "sk_live_CANARY0123456789abcdef",
    "xai": "xai-CANARY0123456789abcdefghijklmnopqrst",
    "groq": "gsk_CANARY0123456789abcdefghijklmnopqrst",
    "nvidia": "nvapi-CANARY0123456789abcdefghijklmnopqrst",
    "github": "ghp_CANARY0123456789abcdefghij012345",
    "github fine": "github_pat_CANARY0123456789abcdefghij",
    "gitlab": "glpat-CANARY0123456789abcd",
    "npm": "npm_CANARY0123456789abcdefghij0123456789",
    "pypi": "pypi-CANARY0123456789abcdef",
    "aws": "AKIACANARY0123456789",
    "aws session": "ASIACANARY0123456789",
    "google": "AIzaCANARY0123456789abcdefghijklmnopqrs",
    "google oauth": "ya29.CANARY0123456789abcdefghij",
    "slack": "xoxb-CANARY-0123456789-abcdef",
    "vault": "hvs.CANARY0123456789abcdefghij",
    "sendgrid": "SG.CANARY0123456789abcd.CANARY0123456789abcd",
    "docker": "dckr_pat_CANARY0123456789abcdefghij",
    "jwt": "eyJhbGciOiJIUzI1NiJ9CANARY.eyJzdWIiOiIxMjM0CANARY.CANARY0123456789",
    "private key": "-----BEGIN RSA PRIVATE KEY-----\nMIICANARYMIICANARY\n-----END RSA PRIVATE KEY-----",
}
"""Every value holds CANARY in what is secret of it."""

IN_TEXT = {
    "password in a url": "cannot read https://me:CANARY@x.net/a.jsonl",
    "password in a url after a key": "cannot list s3://AKIAIOSFODNN7EXAMPLE:CANARY0123@b/a",
    "signed url": "GET https://b.s3.x.net/a?X-Amz-Date=7&X-Amz-Signature=CANARY0123 403",
    "azure": "https://x.blob.net/a?sv=2022&sig=CANARY%3D&sp=r",
    "azure account": "DefaultEndpointsProtocol=https;AccountName=x;AccountKey=CANARY0123456789==;",
    "assignment": "AWS_SECRET_ACCESS_KEY=CANARYabc/DEF+0123456789",
    "yaml": 'api_key: "CANARY0123"',
    "json": '{"client_secret": "CANARY0123", "a": 1}',
    "header": "Authorization: Bearer CANARY0123456789",
    "bearer": "sent bearer CANARY0123456789 twice",
    "slack hook": "https://hooks.slack.com/services/TCANARY/BCANARY/CANARY",
    "password": "password=CANARY",
}

ENVIRONMENT = {
    "WANDB_API_KEY": "CANARYfedcba9876543210fedcba9876543210fe",
    "HF_TOKEN": "CANARY-of-the-hub",
    "AWS_SECRET_ACCESS_KEY": "CANARY/K7MDENG+bPxRfiCYEXAMPLEKEY",
    "MY_DATABASE_PASSWORD": "CANARY-horse-battery",
    "PGPASSWORD": "CANARY-of-postgres",
    "KAGGLE_KEY": "CANARY0123456789abcdef0123456789",
}
"""Keys without a shape of their own: known by the name under which the environment has them."""


def hits(directory: Path) -> list[str]:
    """Every file below a directory that holds a canary, whatever its format, and every name that does."""
    files = [path for path in sorted(directory.rglob("*")) if path.is_file()]
    return [str(path) for path in files if b"CANARY" in path.read_bytes() or "CANARY" in path.name]
