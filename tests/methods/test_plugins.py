"""Methods from outside the package: a file (--plugin) and the entry-point group adav.methods."""

import warnings
from importlib.metadata import EntryPoint

import pytest
from image_tokens import make_image, make_text

from llava.common.errors import UserError
from llava.config import AdaVConfig
from llava.costs.flops import predict
from llava.costs.model_shape import ImageCounts, ModelShape
from llava.methods import installed, plugins
from llava.methods.before_llm import SELECTORS, select, selector_names
from llava.methods.index import method_class, method_names
from llava.methods.inside_llm import DROPPERS

FIRST = '''
from dataclasses import dataclass
from llava.methods.before_llm import Selector
from llava.methods.before_llm.base import take

@dataclass
class First(Selector):
    """The first patches, from `start` on."""
    start: int = 0

    def keep(self, image, text, budget):
        return take(image, image.patches[self.start : self.start + budget])
'''
CUT = """
from dataclasses import dataclass
from llava.methods.inside_llm.fastv import FastV

@dataclass(frozen=True)
class Late(FastV):
    layer: int = 3
"""


def write(folder, name, text):
    path = folder / f"{name}.py"
    path.write_text(text)
    return path


def test_a_file_is_a_method(tables, tmp_path):
    path = write(tmp_path, "first_ones", FIRST)
    assert plugins.register(path) == "first_ones" == plugins.register(path)
    assert method_names()[: len(selector_names())][-1] == "first_ones", "after the methods of the package"
    config = AdaVConfig(method="first_ones", overall_tokens=3, options={"start": 2})
    assert config.make_method().start == 2 and config.unused_options() == []
    image = make_image()
    kept = select("first_ones", image, make_text(), budget=3, start=2)
    assert kept.indices.tolist() == image.patches[2:5].tolist()
    assert plugins.plugin_of("first_ones").file == str(path) and plugins.plugin_of("adav") is None


def test_a_dropper_goes_to_the_droppers(tables, tmp_path):
    plugins.register(write(tmp_path, "late", CUT))
    assert "late" in DROPPERS and "late" not in SELECTORS
    assert AdaVConfig(method="late").make_method().layer == 3
    with pytest.raises(UserError, match="drops tokens inside the LLM"):
        AdaVConfig(method="late", prefill_filter_flag=True)


def test_a_changed_file_is_another_method(tables, tmp_path):
    path = write(tmp_path, "mine", FIRST)
    plugins.register(path)
    before = plugins.plugin_of("mine")
    write(tmp_path, "mine", CUT)
    with pytest.raises(UserError, match="has changed since the run began"):
        plugins.register(path, before.digest)
    plugins.register(path)
    assert "mine" in DROPPERS and "mine" not in SELECTORS and plugins.plugin_of("mine").digest != before.digest


@pytest.mark.parametrize(
    "name, text, said",
    [
        ("adav", FIRST, 'would be called "adav", which is a method of AdaV'),
        ("my-method", FIRST, "allowed are letters, digits and _"),
        ("empty", "x = 1\n", "defines 0 methods (none), allowed is one dataclass"),
        ("two", FIRST + FIRST.replace("First", "Second"), "defines 2 methods (First, Second)"),
        ("imported", "from llava.methods.before_llm.cls import Cls\n", "defines 0 methods"),
        ("bare", FIRST.replace("def keep", "def kept"), "class First does not define keep"),
        ("broken", FIRST + "1 / 0\n", "broken.py, line 13: cannot be imported (ZeroDivisionError"),
        ("typo", FIRST + "x = (\n", "typo.py, line 13: cannot be imported (SyntaxError"),
    ],
)
def test_what_is_no_method_is_one_sentence(tables, tmp_path, name, text, said):
    before = method_names()
    with pytest.raises(UserError) as error:
        plugins.register(write(tmp_path, name, text))
    assert said in str(error.value) and "\n" not in str(error.value) and method_names() == before


def test_two_files_of_one_name_and_no_file(tables, tmp_path):
    (tmp_path / "other").mkdir()
    plugins.register(write(tmp_path, "mine", FIRST))
    with pytest.raises(UserError, match="rename the file"):
        plugins.register(write(tmp_path / "other", "mine", FIRST))
    with pytest.raises(UserError, match="there is no file"):
        plugins.register(tmp_path / "nothing.py")


def test_the_choice_of_a_plugin_is_priced_where_it_says_its_price(tables, tmp_path):
    plugins.register(write(tmp_path, "unpriced", FIRST))
    price = "\n    @staticmethod\n    def cost(case):\n        from llava.costs.method_costs import MethodCost\n"
    plugins.register(
        write(tmp_path, "priced", FIRST + price + "        return MethodCost(7 * case.image.candidates)\n")
    )
    shape = ModelShape(2, 8, 16, 2, 4, 4, (8, 8), 2, 8, 16, 2, 2, 4, 32)

    def flops(method):
        config = AdaVConfig(method=method, overall_tokens=4)
        return predict(shape, config, [ImageCounts((16,))], text_tokens=6, words=[3]).parts["method"]

    with pytest.warns(UserWarning, match='leave out what method "unpriced" needs'):
        assert flops("unpriced") == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert flops("priced") == 7 * 16


class Packaged(method_class("cls")):
    """A method of an installed package."""


def test_methods_of_installed_packages(tables, monkeypatch):
    good = EntryPoint("packaged", f"{__name__}:Packaged", installed.GROUP)
    bad = EntryPoint("damaged", "no_such_module:X", installed.GROUP)
    builtin = EntryPoint("adav", f"{__name__}:Packaged", installed.GROUP)
    monkeypatch.setattr(
        installed, "entry_points", lambda group: [good, bad, builtin] if group == "adav.methods" else []
    )
    for part in (installed.installed, installed.installed_classes):
        part.cache_clear()
    from llava.methods import before_llm

    own = before_llm.SELECTORS["adav"]
    monkeypatch.delitem(vars(before_llm), "SELECTORS")
    try:
        with pytest.warns(UserWarning, match='"damaged" of no_such_module:X cannot be imported'):
            names = before_llm.selector_names()
        assert names[-1] == "packaged" and "damaged" not in names
        assert before_llm.SELECTORS["packaged"] is Packaged and before_llm.SELECTORS["adav"] is own
        assert installed.origin("packaged") == f"{__name__}:Packaged" and installed.origin("cls") is None
    finally:
        monkeypatch.undo()
        for part in (installed.installed, installed.installed_classes):
            part.cache_clear()
