"""transformers' own tests of a model, run on ours."""

import fnmatch
import importlib
import inspect
import unittest
from unittest import mock

import pytest
import torch
from packaging.version import Version
from transformers.models.auto import modeling_auto

from helpers import library_tests
from helpers.library_tests import MODEL_TESTS, PACKAGE, TRAINING_TESTS, VERSION
from nirvana import (
    NirvanaConfig,
    NirvanaForCausalLM,
    NirvanaForSequenceClassification,
    NirvanaForTokenClassification,
    NirvanaModel,
)

try:
    NO_GENERATION_TESTS = library_tests.load()
except library_tests.Unavailable as reason:
    pytest.skip(str(reason), allow_module_level=True)

common = importlib.import_module(f"{PACKAGE}.{MODEL_TESTS}")
training = importlib.import_module(f"{PACKAGE}.{TRAINING_TESTS}")

# Names of the mixins' tests differ between the versions that pyproject.toml admits.
SINCE_5_24 = Version(VERSION) >= Version("5.24")
INITIALISATION = "test_can_init_all_missing_weights"
CAN_OPT_IN = f"{INITIALISATION}_before_2023" in inspect.getsource(common.ModelTesterMixin)

# Every test of the mixins that has nothing to test in this model, by reason. Besides these, only
# the mixins' own decorators skip: for hardware or a package that is not here.
SKIPPED = {
    "the model returns no attention weights, and its window branch has one implementation": (
        "test_attention_outputs",
        "test_attn_implementation_composite_models",
        "test_eager_matches_sdpa_inference_*",
        "test_sdpa_can_dispatch_composite_models",
        "test_sdpa_can_dispatch_non_composite_models",
        "test_sliding_window_mask",
    ),
    "the configuration has no parts": (
        "test_can_set_attention_dynamically_composite_model",
        "test_internal_model_config_and_subconfig_are_same",
    ),
    "there are no experts": (
        "test_eager_matches_batched_and_grouped_inference_*",
        "test_moe_models_record_router_logits",
        "test_output_router_logits_from_config",
    ),
    "positions are none or plain rotary: nothing to rescale or to resize": (
        "test_model_rope_scaling_*",
        "test_model_rope_with_partial_rotation",
        "test_resize_position_vector_embeddings",
        "test_vision_axial_rope",
    ),
    "the model has no encoder": ("test_encoder_decoder_loss_no_double_shift",),
    "float32 inside is a matter of the operations, not of the parameters' dtype": (
        "test_keep_in_fp32_modules",
        "test_keep_in_fp32_modules_exist",
        *(("test_keep_in_fp32_modules_strict_also_hardcode_fp32",) if SINCE_5_24 else ()),
    ),
    "no parameter is renamed on loading": (
        "test_can_load_from_already_mapped_keys",
        "test_reverse_loading_mapping",
    ),
    "there is no plan for tensor parallelism": (
        "test_tied_weights_are_sharded_together"
        if SINCE_5_24
        else "test_tied_head_has_a_tp_plan_entry",
        "test_tp_plan_matches_params",
    ),
    "the model makes no features of images, audio, video or text": (
        "test_get_*_features_*",
        *(("test_multimodal_outputs_are_returned",) if SINCE_5_24 else ()),
    ),
}
if SINCE_5_24:
    SKIPPED["the older name of the cache, the only one before 5.24, is no less supported"] = (
        "test_bc_cache_name_forward",
    )
if not CAN_OPT_IN:
    SKIPPED["the mixin runs it for sources with a copyright line of 2023 or later alone"] = (
        INITIALISATION,
    )
if NO_GENERATION_TESTS:
    SKIPPED[NO_GENERATION_TESTS] = ("test_generation_tester_mixin_inheritance",)


class NirvanaModelTester:
    """What the mixins ask of a model's tests: sizes, a small configuration, inputs."""

    batch_size, seq_length, is_training = 13, 7, True
    vocab_size, hidden_size, num_hidden_layers = 99, 32, 2
    causal_lm_class = NirvanaForCausalLM

    def get_config(self) -> NirvanaConfig:
        return NirvanaConfig(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            num_hidden_layers=self.num_hidden_layers,
            num_prelude_layers=1,
            num_attention_heads=2,
            intermediate_size=48,
            sliding_window=5,
            task_dim=8,
            bank_size=4,
            trigger_lr=0.2,
            trigger_lr_learnable=True,
            trigger_decay=0.8,
            trigger_decay_learnable=True,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )

    def prepare_config_and_inputs_for_common(self):
        input_ids = common.ids_tensor([self.batch_size, self.seq_length], self.vocab_size)
        mask = torch.ones_like(input_ids).tril()
        return self.get_config(), {"input_ids": input_ids, "attention_mask": mask}


class TestNirvana(
    common.ModelTesterMixin,
    common.GenerationTesterMixin,
    training.TrainingTesterMixin,
    unittest.TestCase,
):
    all_model_classes = (
        NirvanaModel,
        NirvanaForCausalLM,
        NirvanaForSequenceClassification,
        NirvanaForTokenClassification,
    )
    model_tester = NirvanaModelTester()
    has_attentions = False
    test_can_init_all_missing_weights_before_2023 = True  # requires more, not less
    _torch_compile_train_cls = NirvanaForCausalLM

    def setUp(self):
        # The mixins find out by its name what a class is for.
        for names, model_class in zip(
            (
                modeling_auto.MODEL_MAPPING_NAMES,
                modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
                modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
                modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
            ),
            self.all_model_classes,
            strict=True,
        ):
            known = mock.patch.dict(names, {NirvanaConfig.model_type: model_class.__name__})
            known.start()
            self.addCleanup(known.stop)
        reason = next((why for why, names in SKIPPED.items() if _matches(self, names)), None)
        if reason is not None:
            super().skipTest(reason)

    def skipTest(self, reason):
        self.fail(f"the mixin skips this test and SKIPPED does not list it: {reason}")

    def _get_conv_state_shape(self, batch_size, config):
        return batch_size, 3 * config.hidden_size, config.conv_size - 1

    def _get_recurrent_state_shape(self, batch_size, config):
        return batch_size, config.num_attention_heads, config.head_dim, config.head_dim


def _matches(test: unittest.TestCase, names: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatchcase(test.id().rpartition(".")[2], name) for name in names)


def test_every_skip_is_of_a_test_that_exists():
    tests = [name for name in dir(TestNirvana) if callable(getattr(TestNirvana, name))]
    for reason, names in SKIPPED.items():
        for name in names:
            assert fnmatch.filter(tests, name), f"no such test: {name} ({reason})"


@pytest.mark.skipif(NO_GENERATION_TESTS is not None, reason=f"generation: {NO_GENERATION_TESTS}")
def test_the_generation_mixin_is_run():
    assert any(name.startswith("test_generate") for name in dir(TestNirvana))
