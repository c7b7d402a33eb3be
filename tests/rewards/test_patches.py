"""The strict reader of patches: what git makes of two trees goes in, and nothing is smuggled."""

import difflib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from consilience.rewards.patches import PatchError, apply_patch, is_protected

BASE = {
    "calc.py": "def add(a, b):\n    return a - b\n\n\ndef twice(x):\n    return 2 * x\n",
    "lib/util.py": "X = 1\n",
}
FIX = """diff --git a/calc.py b/calc.py
index 1111111..2222222 100644
--- a/calc.py
+++ b/calc.py
@@ -1,2 +1,2 @@
 def add(a, b):
-    return a - b
+    return a + b
"""
NEW = "--- /dev/null\n+++ b/{}\n@@ -0,0 +1 @@\n+x\n"


def patch_of(path, old, new):
    return "".join(difflib.unified_diff(old.splitlines(True), new.splitlines(True), f"a/{path}", f"b/{path}"))


def test_a_change_a_new_file_and_a_removed_one_are_applied():
    applied = apply_patch(FIX, BASE)
    assert applied.files == {"calc.py": BASE["calc.py"].replace("a - b", "a + b")} and applied.dropped == ()
    new = "--- /dev/null\n+++ b/lib/more.py\n@@ -0,0 +1,2 @@\n+Y = 2\n+Z = 3\n"
    assert apply_patch(new, BASE).files == {"lib/more.py": "Y = 2\nZ = 3\n"}
    gone = "--- a/lib/util.py\n+++ /dev/null\n@@ -1 +0,0 @@\n-X = 1\n"
    assert apply_patch(gone, BASE).files == {"lib/util.py": None}
    assert set(apply_patch(FIX + new, BASE).files) == {"calc.py", "lib/more.py"}


def test_only_a_new_line_ends_a_line():
    base = {"f.py": "a\n\x0cb\u2028c\n\x1cd\n"}
    changed = "--- a/f.py\n+++ b/f.py\n@@ -2,2 +2,2 @@\n \x0cb\u2028c\n-\x1cd\n+\x85e\n"
    assert apply_patch(changed, base).files == {"f.py": "a\n\x0cb\u2028c\n\x85e\n"}


@given(
    st.lists(st.sampled_from(["a", "b", "", "  c", "-d", "+e", "@@", "--- x"]), max_size=12),
    st.lists(st.sampled_from(["a", "b", "", "  c", "-d", "+e", "@@", "--- x"]), max_size=12),
)
def test_what_difflib_writes_is_applied_to_the_letter(old_lines, new_lines):
    old, new = ("".join(line + "\n" for line in lines) for lines in (old_lines, new_lines))
    if old != new:
        assert apply_patch(patch_of("f.py", old, new), {"f.py": old}).files == {"f.py": new}


@pytest.mark.parametrize(
    "path",
    [
        "tests/test_calc.py",
        "test_calc.py",
        "calc_test.py",
        "conftest.py",
        "lib/conftest.py",
        "Conftest.py",
        "pytest.ini",
        "tox.ini",
        "setup.cfg",
        "pyproject.toml",
        "sitecustomize.py",
        "usercustomize.py",
        "x.pth",
        "lib/x.pth",
        ".github/workflows/ci.yml",
        ".gitattributes",
        ".gitmodules",
        ".git/hooks/pre-commit",
        "lib/tests/x.py",
        ".env",
        "Makefile",
        "setup.py",
        "data.json",
    ],
)
def test_what_decides_on_tests_or_is_not_allowed_is_dropped_and_named(path):
    smuggled = f"--- /dev/null\n+++ b/{path}\n@@ -0,0 +1 @@\n+import os\n"
    if path.startswith(".git/"):
        with pytest.raises(PatchError):
            apply_patch(smuggled, BASE)
        return
    applied = apply_patch(FIX + smuggled, BASE)
    assert set(applied.files) == {"calc.py"} and applied.dropped == (path,)
    assert is_protected(path) or path == "data.json"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "no patch"),
        ("PASSED", "no patch"),
        (
            "new file mode 120000\n--- /dev/null\n+++ b/x.py\n@@ -0,0 +1 @@\n+/etc/passwd\n",
            "120000",
        ),
        (
            "new file mode 160000\n--- /dev/null\n+++ b/x.py\n@@ -0,0 +1 @@\n+Subproject\n",
            "160000",
        ),
        ("diff --git a/calc.py b/calc.py\nold mode 100644\nnew mode 100755\n", "old mode"),
        ("new file mode 100755\n--- /dev/null\n+++ b/x.py\n@@ -0,0 +1 @@\n+x\n", "100755"),
        ("index 1..2 120000\n--- a/calc.py\n+++ b/calc.py\n@@ -1 +1 @@\n-def add(a, b):\n+x\n", "120000"),
        ("similarity index 100%\nrename from calc.py\nrename to tests/test_calc.py\n", "similarity"),
        ("copy from calc.py\ncopy to conftest.py\n", "copy from"),
        ("--- a/calc.py\n+++ b/lib/calc.py\n@@ -1 +1 @@\n-def add(a, b):\n+x\n", "renamed"),
        ("GIT binary patch\nliteral 5\n", "binary"),
        ("Binary files a/x and b/x differ\n", "Binary"),
        ("--- /dev/null\n+++ b/../x.py\n@@ -0,0 +1 @@\n+x\n", "no path"),
        ("--- /dev/null\n+++ /etc/x.py\n@@ -0,0 +1 @@\n+x\n", "no path"),
        ("--- /dev/null\n+++ b/a//x.py\n@@ -0,0 +1 @@\n+x\n", "no path"),
        ('--- /dev/null\n+++ "b/x\\056py"\n@@ -0,0 +1 @@\n+x\n', "no path"),
        ("--- /dev/null\n+++ b/.GIT/config\n@@ -0,0 +1 @@\n+x\n", "no path"),
        ("--- /dev/null\n+++ b/x\u202e.py\n@@ -0,0 +1 @@\n+x\n", "no path"),
        ("--- /dev/null\n+++ b/x.py\n@@ -0,0 +1 @@\n+x\0\n", "NUL"),
        ("--- /dev/null\n+++ b/calc.py\n@@ -0,0 +1 @@\n+x\n", "exists already"),
        ("--- a/none.py\n+++ b/none.py\n@@ -1 +1 @@\n-x\n+y\n", "not in the base"),
        ("--- /dev/null\n+++ b/calc.py/x.py\n@@ -0,0 +1 @@\n+x\n", "folder"),
        ("--- a/calc.py\n+++ b/calc.py\n@@ -1 +1 @@\n-def sub(a, b):\n+x\n", "not what the patch says"),
        ("--- a/calc.py\n+++ b/calc.py\n@@ -99 +99 @@\n-x\n+x\n", "out of place"),
        ("--- a/calc.py\n+++ b/calc.py\n@@ -1,3 +1,3 @@\n-x\n", "hunk"),
        ("--- a/calc.py\n+++ b/calc.py\n", "no change"),
        ("--- a/calc.py\n", "without '+++'"),
        ("@@ -1 +1 @@\n-x\n+y\n", "without a file"),
        ("--- a/calc.py\n+++ /dev/null\n@@ -1 +0,0 @@\n-def add(a, b):\n", "leaves text"),
        (f"{NEW.format('x.py')}{NEW.format('x.py/y.py')}", "folder"),
        (f"{NEW.format('x.py/y.py')}{NEW.format('x.py')}", "folder"),
        (NEW.format("x.py").replace("x\n", "\ud800\n"), "halves"),
        (f"--- a/calc.py\n+++ b/calc.py\n@@ -1,{'9' * 5000} +1 @@\n x\n", "no change"),
        (f"--- a/calc.py\n+++ b/calc.py\n@@ -{'9' * 5000} +1 @@\n x\n", "no change"),
        ("--- a/calc.py\n+++ b/calc.py\n@@ -\u0661 +1 @@\n-def add(a, b):\n+x\n", "no change"),
        (FIX + FIX, "twice"),
        ("x" * (2 << 20), "characters"),
    ],
)
def test_everything_else_is_refused_with_a_reason(text, words):
    with pytest.raises(PatchError, match=words.replace("+", r"\+")):
        apply_patch(text, BASE)
