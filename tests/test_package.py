"""The package as a whole: its import, its registration, its packaged models."""

import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest
import torch
import transformers
from transformers.models.auto import modeling_auto
from transformers.processing_utils import transformers_module

import nirvana
from helpers.forks import Forks
from nirvana import InputError, NirvanaConfig, NirvanaForCausalLM, preset
from nirvana._auto import MODELS
from nirvana.model.assets import load_language_model
from nirvana.packaged import resolve

# What the library and the package import of others, none of which imports either.
OTHERS = (
    *("torch", "torch._dynamo", "torch.distributed.checkpoint", "torch.distributed.tensor"),
    *("torch.export", "huggingface_hub", "jinja2", "numpy", "safetensors.torch", "scipy.optimize"),
    *("sympy", "tokenizers"),
)


@pytest.fixture(scope="module")
def python() -> Iterator[Callable[[str], str]]:
    """What a program prints in a process that has imported neither the library nor the package."""
    with Forks(*OTHERS) as forks:
        code = "import sys; print({'nirvana', 'transformers', 'accelerate'} & sys.modules.keys())"
        assert forks.run(code) == ([0], "set()\n")

        def call(code: str) -> str:
            (status,), output = forks.run(code)
            assert status == 0, output
            return output.strip()

        yield call


def test_importing_pulls_in_nothing_heavy():
    code = "import nirvana, sys; print(*sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    loaded = set(done.stdout.split())
    heavy = {"triton", "datasets", "matplotlib", "monai", "scipy", "h5py", "nibabel"}
    assert not loaded & (heavy | {"torch", "transformers", "numpy", "rich", "typer"})


@pytest.mark.parametrize(
    "imports",
    [
        "import nirvana; from transformers import AutoModelForCausalLM",
        "from transformers import AutoModelForCausalLM; import nirvana",
        "from nirvana import NirvanaModel; from transformers import AutoModelForCausalLM",
        "import nirvana.model.nirvana; from transformers import AutoModelForCausalLM",
        "import nirvana; from transformers import LlamaForCausalLM, AutoModelForCausalLM",
        "import nirvana, transformers.trainer; from transformers import AutoModelForCausalLM",
        "import transformers, nirvana; from transformers import AutoModelForCausalLM",
        "import nirvana.model.config; from transformers import AutoModelForCausalLM",
        "from transformers import AutoConfig; import nirvana; from transformers import "
        "AutoModelForCausalLM",
    ],
)
def test_the_auto_classes_know_the_model_in_any_order(python, imports):
    code = f"{imports}; import nirvana; c = nirvana.preset('tiny', hidden_size=48, vocab_size=9)"
    code += "; print(type(AutoModelForCausalLM.from_config(c)).__name__)"
    assert python(code) == "NirvanaForCausalLM"


@pytest.mark.parametrize(("auto_class", "name"), MODELS.items())
def test_the_tables_of_the_library_hold_the_model(auto_class, name):
    model = getattr(nirvana, name)
    mapping = getattr(modeling_auto, auto_class)._model_mapping
    assert mapping[NirvanaConfig] is model
    assert model in mapping._extra_content.values()
    assert (NirvanaConfig, model) in mapping._extra_content.items()
    assert pickle.loads(pickle.dumps(mapping))[NirvanaConfig] is model
    table = {
        "AutoModel": modeling_auto.MODEL_MAPPING_NAMES,
        "AutoModelForCausalLM": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        "AutoModelForSequenceClassification": (
            modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES
        ),
        "AutoModelForTokenClassification": (
            modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES
        ),
    }[auto_class]
    assert table[NirvanaConfig.model_type] == name
    # The library runs its `__init__` twice: other modules hold this second one.
    for module in (transformers, transformers_module):
        assert getattr(module, name) is model
    assert not hasattr(transformers, "NirvanaForNothing")


@pytest.mark.parametrize(
    "imports", ["import nirvana, transformers", "import transformers, nirvana"]
)
def test_auto_config_knows_the_configuration(python, imports):
    code = f"{imports}; from transformers import AutoConfig, CONFIG_MAPPING"
    code += "; c = AutoConfig.for_model('nirvana', hidden_size=48, num_attention_heads=3)"
    code += "; print(CONFIG_MAPPING['nirvana'] is nirvana.NirvanaConfig is type(c), c.hidden_size)"
    assert python(code) == "True 48"


def test_the_hook_leaves_the_library_its_own_loader(python):
    """So that its source and data files are found as without us."""
    code = "import nirvana, transformers, importlib.resources, inspect, sys"
    code += "; from importlib.machinery import SourceFileLoader as L"
    code += "; import transformers.models.auto.configuration_auto as m"
    code += "; print(type(transformers.__spec__.loader) is L, type(m.__loader__) is L"
    code += ", type(m.__spec__.loader) is L, 'CONFIG_MAPPING' in inspect.getsource(m)"
    code += ", (importlib.resources.files('transformers') / '__init__.py').is_file()"
    code += ", sum('nirvana' in type(f).__module__ for f in sys.meta_path))"
    # Two finders are left: of the library's and of our modelling code, which nothing has imported.
    assert python(code) == "True True True True True 2"


def test_public_names():
    assert set(nirvana.__all__) <= set(dir(nirvana))
    assert [name for name in dir(nirvana) if not name.startswith("_")] == nirvana.__all__
    for name in nirvana.__all__:
        assert getattr(nirvana, name) is not None
    with pytest.raises(AttributeError, match="'nirvana' has no attribute 'nothing'"):
        _ = nirvana.nothing


def test_the_tables_do_not_import_the_model_before_it_is_looked_up(python):
    code = "import nirvana, sys; from transformers import AutoModelForCausalLM, LlamaForCausalLM"
    code += "; before = 'nirvana.model.nirvana' in sys.modules; import transformers"
    code += "; print(before, transformers.NirvanaForCausalLM.__module__)"
    assert python(code) == "False nirvana.model.nirvana"


def test_the_packaged_model_reads_and_writes():
    model, tokenizer = nirvana.load("tiny")
    text = "Magnetic resonance imaging — of the brain, 3.5 µm\n"
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert tokenizer.decode(ids) == text
    assert next(model.parameters()).dtype == torch.float32
    tokens = torch.tensor([[tokenizer.bos_token_id, *ids]])
    with torch.no_grad():
        loss = model(tokens, labels=tokens).loss.item()
    assert loss < 6  # an untrained model pays ln 8192 = 9.0


def test_unknown_names_and_folders_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"no language model 'huge'.*tiny"):
        resolve("huge")
    with pytest.raises(InputError, match=r"no MRI codec 'tiny'.*codec"):
        resolve("tiny", "MRI codec")
    with pytest.raises(InputError, match=r"no config\.json"):
        resolve(tmp_path)
    preset("tiny").save_pretrained(tmp_path)
    with pytest.raises(InputError, match="no weights"):
        resolve(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"not weights")
    with pytest.raises(InputError, match=r"no tokenizer\.json"):
        load_language_model(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match="does not hold a Nirvana language model"):
        load_language_model(tmp_path)


def test_weights_that_do_not_fit_are_named(tmp_path):
    NirvanaForCausalLM(preset("tiny", vocab_size=50)).save_pretrained(tmp_path)
    preset("tiny", vocab_size=50, num_hidden_layers=9).save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match=r"do not fit its config\.json: missing.*layers\.8"):
        load_language_model(tmp_path)
