"""The command that prepares data sets."""

from tests.preparation import published


def test_it_prepares_what_is_named_and_ends_with_a_message(program, tmp_path):
    published.write_nico_pp(tmp_path, each=1)
    status, out, err = program.run(
        "prepare_data",
        "--dataset=nico_pp",
        f"--data_dir={tmp_path / 'data'}",
        f"--manual_dir={tmp_path}",
    )
    assert "downloading and writing" in out and "Traceback" not in err
    assert status == 1 and "has train+test 18 examples, published are train+test 88,866" in err
    arguments = ["--dataset=nico_pp", f"--data_dir={tmp_path / 'data'}", "--nocheck_counts"]
    status, out, _ = program.run("prepare_data", *arguments)
    assert status == 0 and "is there, reading all of it" in out and "downloading" not in out


def test_it_lists_what_there_is(program):
    status, out, _ = program.run("prepare_data", "--list")
    assert status == 0 and "586,575" in out and "88,866" in out
