"""Credentials are in no message and in nothing that is written."""

import pytest

from lpl_jax.data import open_source
from lpl_jax.errors import InputError
from lpl_jax.experiment.data import DataConfig
from lpl_jax.io import faults
from lpl_jax.io.paths import to_path
from lpl_jax.redaction import redact, refuse_credentials
from lpl_jax.tools import prepare, train

SECRETS = {
    "HF_TOKEN": "hf_qwertyuiopasdfghjklz",
    "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMIbPxRfiCYEXAMPLEKEY",
    "AWS_SESSION_TOKEN": "FwoGZXIvYXdzEXAMPLE",
}
URLS = (
    "https://somebody:pass-word@host/a.tar",
    "s3://AKIAQWERTYUIOPASDFGH:sec%2Fret@bucket/a.tar",
    "https://host/a.tar?X-Amz-Credential=AKIAQWERTYUIOPASDFGH&X-Amz-Signature=0123abcd",
    "https://host/a.tar?sv=2024&sig=0123abcd",
)
WORDS = ("pass-word", "sec%2Fret", "0123abcd", "AKIAQWERTYUIOPASDFGH", *SECRETS.values())


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)


def test_error_lines_hold_no_credentials():
    text = f"cannot open {' or '.join(URLS)} with {' and '.join(SECRETS.values())}"
    for error in (InputError(text), RuntimeError(text), ConnectionError(text), OSError(5, text, URLS[0])):
        line, _ = faults.explain(error)
        assert line and not any(word in line for word in WORDS), line


def test_what_is_no_credential_stays():
    text = "gs://bucket/{00000..00099}.tar, owner/name@v1, a@b.c, https://host/a?page=2&sort=new, /data/key=1/a.tar"
    assert redact(text, {"TOKENIZERS_PARALLELISM": "a@b.c and more"}) == text
    refuse_credentials("owner/name@v1", "train.init_from")


@pytest.mark.parametrize("url", URLS)
@pytest.mark.parametrize(
    "given",
    [
        lambda url: DataConfig(source=url),
        lambda url: DataConfig(store=url),
        lambda url: open_source(url, 8),
        lambda url: to_path(url, "--out", remote=True),
    ],
)
def test_a_url_with_credentials_is_refused(given, url):
    with pytest.raises(InputError, match="holds credentials") as refused:
        given(url)
    assert not any(word in str(refused.value) for word in WORDS)


@pytest.mark.parametrize("url", URLS)
def test_nothing_that_a_program_writes_holds_credentials(tmp_path, capfd, url):
    """Of starts that fail early: everything in the folder, and all that is printed."""
    with pytest.raises(InputError) as failed:
        prepare.main(["--source", url, "--resolution", "8", "--out", str(tmp_path / "store")])
    lines = [faults.explain(failed.value)[0]]
    override = [f"--config.data.source={url}", "--config.train.steps=1"]
    with pytest.raises(InputError) as failed:
        train.main(["--config", "quickstart", "--workdir", str(tmp_path / "run"), *override])
    lines += [faults.explain(failed.value)[0], *capfd.readouterr()]
    for path in tmp_path.rglob("*"):
        if path.is_file():
            lines.append(path.read_bytes().decode(errors="replace"))
    assert not any(word in line for word in WORDS for line in lines)


@pytest.mark.slow
def test_a_store_that_is_made_holds_nothing_of_the_environment(tmp_path, capfd):
    arguments = ["--source", "photos", "--crops", "1", "--resolution", "16", "--out", str(tmp_path / "store")]
    assert prepare.main(arguments) == 0
    written = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    written += [text.encode() for text in capfd.readouterr()]
    assert written and not any(secret.encode() in content for content in written for secret in SECRETS.values())
