"""The folder of a search."""

from distdl.search.folder import SEARCH, SearchFolder


def test_undo_removes_a_new_search_and_nothing_of_an_earlier_one(tmp_path):
    above = tmp_path / "above"
    new = SearchFolder(above / "search", ours=False)
    new.write(SEARCH, b"{}")
    new.undo()
    new.close()
    assert not above.exists()
    (tmp_path / "earlier").mkdir()
    (tmp_path / "earlier" / SEARCH).write_text("{}")
    earlier = SearchFolder(tmp_path / "earlier", ours=False)
    earlier.undo()
    earlier.close()
    assert (tmp_path / "earlier" / SEARCH).read_text() == "{}"
