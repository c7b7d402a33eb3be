"""`consilience plan`: the tables, what it takes, what it refuses, and that nothing heavy is loaded."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from consilience.cli.main import main, parse
from consilience.cli.plan import compared_models, planned_model
from consilience.conf.load import compose
from consilience.model.config import FLASH, MINI, PRO

ROOT = Path(__file__).parents[2]


def planned(capsys, *words):
    """What the verb prints."""
    assert main(["plan", *words]) == 0
    return capsys.readouterr().out


def row(text, first):
    """Cells of the line that begins with `first`."""
    (line,) = [line for line in text.splitlines() if line.strip().startswith(first + "  ")]
    return re.split(r"\s{2,}", line.strip())[1:]


def test_flash_at_one_million_tokens_prints_the_figures_of_the_report(capsys):
    text = planned(capsys, "model=flash", "context=1M")
    assert "flash: 43 layers (2 sliding, 21 CSA, 20 HCA)" in text
    assert "context: 1M = 1,000,000 tokens" in text
    assert "284,332,240,471" in text and "13,270,101,591" in text
    assert row(text, "with MTP")[0] == "290,942,289,362"
    assert row(text, "V4-Pro") == ["0.3102", "27.1%", "3.69×", "5.0360", "10.5%", "9.54×"]
    assert row(text, "V4-Flash") == ["0.1166", "10.2%", "9.83×", "3.5175", "7.3%", "13.67×"]
    assert row(text, "report: Pro") == ["27%", "3.7×", "10%", "9.5×"]
    assert row(text, "report: Flash") == ["10%", "9.8×", "7%", "13.7×"]


def test_pro_prints_its_own_totals(capsys):
    text = planned(capsys, "model=pro", "context=1M")
    assert "1,572,997,201,763" in text and "1,598,837,347,742" in text and "48,852,402,019" in text


@pytest.mark.parametrize("model", ["tiny", "mini", "small", "flash", "pro"])
def test_every_table_fits_a_terminal_of_80_columns_uncut(model, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    text = planned(capsys, f"model={model}", "context=2^20")
    assert "…  " not in text and max(map(len, text.splitlines())) <= 80
    assert sum(line.count("─") > 20 for line in text.splitlines()) == 5  # one rule under each heading


def test_the_sums_printed_are_the_sums_of_the_rows(capsys):
    text = planned(capsys, "model=mini", "context=4096")
    parts = text[text.index("Parameters") : text.index("Memory")]
    counts = [int(n.replace(",", "")) for n in re.findall(r"^  [\w ]+?  +([\d,]+)", parts, re.MULTILINE)]
    assert len(counts) == 11 and sum(counts[:-1]) == counts[-1]


def test_without_a_context_the_models_longest_is_taken(capsys):
    assert "context: the model's longest = 1,048,576 tokens" in planned(capsys, "model=flash")


def test_a_context_beyond_the_models_longest_is_said(capsys):
    assert "beyond the model's longest stream, 2,048" in planned(capsys, "model=tiny", "context=64K")


def test_sizes_of_the_model_may_be_changed(capsys):
    text = planned(capsys, "model=flash", "model.index_topk=1024", "context=1M")
    assert "flash (changed): 43 layers" in text
    assert row(text, "flash (changed)")[1] != row(text, "V4-Flash")[1]


def test_a_checkpoint_folder_is_planned_for_by_its_config(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(MINI.to_json_dict()))
    assert planned_model(compose([f"plan.checkpoint={tmp_path}"])) == (tmp_path.name, MINI)
    assert f"{tmp_path.name}: 6 layers" in planned(capsys, f"checkpoint={tmp_path}")


def test_the_comparison_names_another_model_beside_the_released_ones():
    assert (
        list(compared_models("flash", FLASH)) == list(compared_models("pro", PRO)) == ["V4-Pro", "V4-Flash"]
    )
    assert list(compared_models("mini", MINI)) == ["V4-Pro", "V4-Flash", "mini"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["model=flahs"], "group 'model' has no option 'flahs'; did you mean 'flash'?"),
        (["context=0"], "plan.context is '0', but a number of tokens from 1 to 2^40 is needed"),
        (["context=abc"], "plan.context is 'abc', but a number of tokens from 1 to 2^40 is needed"),
        (["plan.context=2^99"], "plan.context is '2^99'"),
        (["contxt=1M"], "unknown setting 'contxt' of plan; did you mean 'context'?"),
        (["modle=flash"], "unknown setting 'modle' of plan; did you mean 'model'?"),
        (["plot=costs.gif"], "its name must end in .png, .svg, .pdf"),
        (["plot=no/such/folder/costs.png"], "there is no folder 'no/such/folder'"),
        (["checkpoint=no/such/folder"], "no checkpoint lies there"),
        (["model=flash", "model.num_hidden_layers=2"], "compress_ratios has 43 entries for 2 layers"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(words, said, capsys):
    assert main(["plan", *words]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert said in captured.err and captured.err.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "said"), [("{", "is no JSON file"), ("[1]", "no table of fields"), ("{}", "field")]
)
def test_a_config_that_is_not_one_is_refused(text, said, tmp_path, capsys):
    (tmp_path / "config.json").write_text(text)
    assert main(["plan", f"checkpoint={tmp_path}"]) == 2
    assert said in capsys.readouterr().err


def test_a_verb_may_leave_out_the_name_of_its_own_group():
    words = ["plan", "model=flash", "context=1M", "plan.plot=a.png", "run.name=x"]
    assert parse(words).overrides == ("model=flash", "plan.context=1M", "plan.plot=a.png", "run.name=x")
    assert parse(["doctor", "context=1M"]).overrides == ("context=1M",)  # doctor has no group


def test_neither_torch_nor_matplotlib_is_loaded_for_the_tables():
    program = (
        "import sys\n"
        "from consilience.cli.main import main\n"
        "assert main(['plan', 'model=pro', 'context=1M']) == 0\n"
        "print(sorted({'torch', 'numpy', 'matplotlib', 'ray'} & set(sys.modules)), file=sys.stderr)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.stderr.strip() == "[]"


def test_a_rank_of_the_configured_engine_has_its_table_and_one_process_none(capsys):
    words = ["model=flash", "engine.ranks=64", "rollout.proof=off"]
    text = planned(capsys, *words, "engine.kind=fsdp")
    assert "SFT in fp32 on 64 ranks of fsdp, micro-batches of 4,096 tokens" in text
    table = text[text.index("SFT in fp32") :]
    parts = [
        float(row(table, name)[0].replace(",", "")) for name in ("weights", "gradients", "optimiser state")
    ]
    assert parts[0] == pytest.approx(4 * 290.942 / 64, abs=0.01) and parts[1] > 1000 > parts[2]
    assert "SFT in fp32 on" not in planned(capsys, "model=flash")
