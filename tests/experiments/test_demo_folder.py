import json

import pytest

from headway.errors import ConfigError
from headway.experiments.demo.folder import MARK, claim_folder, finish_folder, write_json


def test_a_new_folder_is_made_and_marked_unfinished_until_the_demo_ends(tmp_path):
    folder = tmp_path / "a" / "demo"
    claim_folder(folder, replace_demo=False)
    assert json.loads((folder / MARK).read_text()) == {"finished": False}
    finish_folder(folder)
    assert json.loads((folder / MARK).read_text()) == {"finished": True}


def test_an_earlier_demo_is_replaced_whole_when_allowed(tmp_path):
    claim_folder(tmp_path, replace_demo=False)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "weights").write_text("old")
    (tmp_path / "report.html").write_text("old")
    finish_folder(tmp_path)
    claim_folder(tmp_path, replace_demo=True)
    assert [entry.name for entry in tmp_path.iterdir()] == [MARK]
    assert json.loads((tmp_path / MARK).read_text()) == {"finished": False}


def test_an_earlier_demo_is_kept_when_not_allowed(tmp_path):
    claim_folder(tmp_path, replace_demo=False)
    (tmp_path / "report.html").write_text("mine")
    with pytest.raises(ConfigError, match="--overwrite"):
        claim_folder(tmp_path, replace_demo=False)
    assert (tmp_path / "report.html").read_text() == "mine"


@pytest.mark.parametrize("replace_demo", [True, False])
def test_files_that_no_demo_wrote_are_never_deleted(tmp_path, replace_demo):
    (tmp_path / "thesis.txt").write_text("five years")
    with pytest.raises(ConfigError, match=r"thesis\.txt.*another --output"):
        claim_folder(tmp_path, replace_demo=replace_demo)
    assert (tmp_path / "thesis.txt").read_text() == "five years"


def test_links_in_an_earlier_demo_are_removed_and_what_they_point_to_is_kept(tmp_path):
    treasure = tmp_path / "treasure"
    treasure.mkdir()
    (treasure / "gold").write_text("gold")
    folder = tmp_path / "demo"
    claim_folder(folder, replace_demo=False)
    (folder / "link").symlink_to(treasure)
    claim_folder(folder, replace_demo=True)
    assert (treasure / "gold").read_text() == "gold"


def test_a_file_or_a_link_is_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    for name in ("file", "link"):
        with pytest.raises(ConfigError, match="file or a link"):
            claim_folder(tmp_path / name, replace_demo=True)


def test_a_document_that_cannot_be_json_leaves_the_old_one(tmp_path):
    write_json(tmp_path / "a.json", {"x": 1})
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "a.json", {"x": float("nan")})
    assert json.loads((tmp_path / "a.json").read_text()) == {"x": 1}
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.json"]
