"""Proves the exact text of the table of a load report, and what makes it a failure."""

from __future__ import annotations

from crossmae.checkpoints.load_report import LoadReport, TensorEntry, ranges, split_name


def test_table() -> None:
    entries = [
        TensorEntry(f"backbone.net.blocks.{i}.attn.qkv.weight", "mismatched", "", (3, 1), (6, 2), False)
        for i in (0, 1, 3)
    ]
    entries += [
        TensorEntry(f"blocks.{i}.attn.rel_pos_{axis}", "new", "keeps its value") for i in range(12) for axis in "hw"
    ]
    entries += [
        TensorEntry("wfm.linear.weight", "dropped", "unexpected", accepted=False),
        TensorEntry("norm.bias", "dropped"),
    ]
    entries += [TensorEntry("patch_embed.proj.weight", "used"), TensorEntry("patch_embed.proj.bias", "used")]
    report = LoadReport("a", "b", entries)
    assert report.table().splitlines() == [
        "  status      module                     tensors  detail",
        "! mismatched  backbone.net.blocks.0-1,3        3  attn.qkv.weight: file (3, 1), model (6, 2)",
        "  new         blocks.0-11                     24  keeps its value: attn.rel_pos_h, attn.rel_pos_w",
        "! dropped     wfm                              1  unexpected: linear.weight",
        "  dropped     norm                             1",
        "  used        patch_embed                      2",
        "  2 used, 2 dropped, 24 new, 3 mismatched",
    ]
    assert not report.ok


def test_ok() -> None:
    used, new = TensorEntry("a", "used"), TensorEntry("b", "new")
    assert LoadReport("a", "b", [used, new]).ok
    assert not LoadReport("a", "b", [new]).ok
    assert not LoadReport("a", "b", [used, TensorEntry("b", "new", accepted=False)]).ok


def test_names_in_the_table() -> None:
    assert ranges([0, 1, 2, 5, 7, 8]) == "0-2,5,7-8"
    assert split_name("backbone.net.blocks.10.norm1.bias") == ("backbone.net.blocks", "10", "norm1.bias")
    assert split_name("patch_embed.proj.bias") == ("patch_embed", "", "proj.bias")
    assert split_name("cls_token") == ("cls_token", "", "")
