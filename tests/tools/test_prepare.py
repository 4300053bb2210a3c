import json

import numpy as np
import pytest
from PIL import Image

from lpl_jax import autoencoders
from lpl_jax.data import LatentStore, PhotoSource, batches, check_autoencoder
from lpl_jax.errors import InputError
from lpl_jax.tools import cli
from lpl_jax.tools.prepare import main, prepare


def test_photos_from_the_command_line(tmp_path, capsys):
    out = tmp_path / "photos"
    argv = ["--source", "photos", "--crops", "2", "--resolution", "32", "--out", str(out), "--batch-size", "16"]
    argv += ["--seed", "3"]
    assert main(argv) == 0
    first = capsys.readouterr()
    assert "16 images of 8 classes at 32 px" in first.out and "in 1 shard (" in first.out and "img/s" in first.out
    assert first.err == "", "where nobody looks on, stderr is for errors"
    store = LatentStore(out)
    assert len(store) == 16 and store.class_names == PhotoSource(32, crops=2).class_names
    check_autoencoder(store, autoencoders.load("bundled"))
    assert next(batches(store, batch_size=16, seed=0))["mean"].shape == (16, 4, 4, 4)
    size = store.manifest.num_bytes
    assert f"{size / 1e6:.1f} MB" in first.out and f"{size / 16:.0f} bytes per image" in first.out

    assert main(argv) == 0
    assert "complete already" in capsys.readouterr().out

    with pytest.raises(InputError, match="holds another latent store"):
        main([*argv, "--crops", "3"])
    with pytest.raises(InputError, match="holds another latent store"):
        main([*argv, "--seed", "4"])
    with pytest.raises(InputError, match="resolution=20: .* multiple of 8"):
        main([*argv, "--resolution", "20"])
    assert capsys.readouterr() == ("", ""), "no progress bar before the error"


def test_folder_from_the_command_line(tmp_path):
    for i in range(5):
        path = tmp_path / "images" / f"class{i % 2}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((20, 24, 3), 50 * i, np.uint8)).save(path)
    argv = ["--source", str(tmp_path / "images"), "--resolution", "16"]
    argv += ["--limit", "4", "--dtype", "float32", "--shard-records", "3", "--crop", "center_crop", "--batch-size", "8"]
    assert main([*argv, "--out", str(tmp_path / "store")]) == 0
    manifest = json.loads((tmp_path / "store/manifest.json").read_text())
    assert [shard["records"] for shard in manifest["shards"]] == [3, 1]
    assert (manifest["crop"], manifest["dtype"], manifest["num_classes"]) == ("center_crop", "float32", 2)


@pytest.mark.parametrize("name", ["class/1.png", "1.png"])
def test_a_store_in_the_folder_of_its_images_is_refused(tmp_path, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    Image.new("RGB", (20, 20)).save(tmp_path / name)
    (tmp_path / "link").symlink_to(tmp_path)
    with pytest.raises(InputError, match="lies in .*, the folder of images: give a folder outside of it"):
        main(["--source", str(tmp_path), "--resolution", "16", "--out", str(tmp_path / "link/store")])
    assert not (tmp_path / "store").exists()


def test_lines_of_a_source_stand_alone_in_a_log(tmp_path, capsys):
    (tmp_path / "images/class/in").mkdir(parents=True)
    Image.new("RGB", (20, 20)).save(tmp_path / "images/class/in/1.png")
    main(["--source", str(tmp_path / "images"), "--resolution", "16", "--out", str(tmp_path / "store")])
    first, second = capsys.readouterr().out.splitlines()
    assert first.endswith("images in class/in are of class class") and second.startswith(f"{tmp_path / 'store'}: 1 ")


def test_an_unreadable_image_leaves_no_file_and_no_bar(tmp_path, capsys):
    broken = tmp_path / "images/class/broken.png"
    broken.parent.mkdir(parents=True)
    broken.write_bytes(b"")
    argv = ["--source", str(tmp_path / "images"), "--resolution", "16", "--out", str(tmp_path / "store")]
    with pytest.raises(SystemExit):
        cli.run_main(main, argv)
    err = capsys.readouterr().err
    formats = "JPEG, PNG, WEBP, BMP, GIF, TIFF, AVIF"
    advice = "(max_skipped, a number or a share, passes over such images)"
    assert err == f"error: {broken}: not an image that can be read as {formats} {advice}\n"
    assert not (tmp_path / "store").exists()


def test_prepare_can_be_quiet(tmp_path, capsys):
    autoencoder = autoencoders.load("bundled")
    store = prepare(PhotoSource(16, crops=1), autoencoder, tmp_path / "s", progress=False, batch_size=8)
    assert len(store) == 8
    assert capsys.readouterr() == ("", "")


def test_mistakes_end_with_one_line_and_status_2(tmp_path, capsys):
    argv = ["--source", str(tmp_path / "nowhere"), "--resolution", "16", "--out", str(tmp_path / "s")]
    with pytest.raises(SystemExit) as end:
        cli.run_main(main, argv)
    assert end.value.code == 2
    out, err = capsys.readouterr()
    assert out == "" and err == f"error: image folder {tmp_path / 'nowhere'}: no such folder\n"
    assert not (tmp_path / "s").exists()
    with pytest.raises(InputError, match="nowhere"):
        cli.run_main(main, [*argv, "--debug"])


def test_run_main_passes_the_status_on():
    for status, code in [(None, None), (0, 0), (3, 3)]:
        with pytest.raises(SystemExit) as end:
            cli.run_main(lambda argv, status=status: status, [])
        assert end.value.code == code


def test_run_main_keeps_an_error_in_one_line(capsys):
    def fail(argv):
        raise InputError("two\nlines")

    with pytest.raises(SystemExit):
        cli.run_main(fail, [])
    assert capsys.readouterr().err == "error: two lines\n"


def test_an_interrupt_is_not_a_traceback(capsys):
    def interrupt(argv):
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as end:
        cli.run_main(interrupt, [])
    assert end.value.code == 130 and capsys.readouterr().err == "stopped\n"
