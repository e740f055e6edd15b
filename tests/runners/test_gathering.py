from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest
import torch

from evlgen.runners.gathering import gather_records, gather_rows

PROGRAM = Path(__file__).with_name("gather.py")


@pytest.fixture(scope="module")
def found(forks, tmp_path_factory):
    """What two processes gathered: case -> what each had got, and whether it was pickled."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    shown = tmp_path_factory.mktemp("gather") / "shown.txt"
    code, text = forks.run(PROGRAM, shown=shown, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    assert code == 0, text
    return json.loads(text.splitlines()[-1])


def test_plain_records_are_gathered_in_order_without_pickle(found):
    first = {
        "image_id": 7,
        "caption": "ein Würfel \ud83d",
        "scores": [0.1 + 0.2, float("inf"), -0.0],
        "x": None,
    }
    second = [{"image_id": "a/b.jpg", "caption": "", "is": True, "one": 1.0}, "x", 3, {}]
    assert found["plain"] == [repr([first, *second]), False]
    assert found["one has none"] == [repr([first]), False]
    assert found["none has any"] == ["[]", False]


def test_what_json_would_change_is_pickled_on_all_processes(found):
    assert found["a tuple"] == ["[[1, 2], (1, 2)]", True]
    assert found["a key that is a number"] == ["[{1: 'a'}]", True]
    assert found["a tensor"] == ["[tensor([1., 1.])]", True]


def test_rows_of_tensors_are_gathered_whatever_their_numbers(found):
    assert found["rows"] == [[0, 1, 2], [3, 4, 5], [7, 7, 7]]
    assert found["rows of one"] == [[0, 1, 2], [3, 4, 5]]


def test_one_process_keeps_what_it_has():

    records = [(1, 2), object()]
    assert gather_records(records) is records
    assert gather_rows(torch.ones(2, 3)).tolist() == [[1, 1, 1], [1, 1, 1]]
