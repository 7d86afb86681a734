"""Published sizes: the totals of parameters, counted without making any."""

import pytest

import archlab
from archlab.analysis.accounts import count_parameters

TOTALS = {
    "gpt2-124m": 124_439_808, "gpt2-xl": 1_557_611_200,
    "llama-2-7b": 6_738_415_616, "llama-2-13b": 13_015_864_320, "llama-2-70b": 68_976_648_192,
    "llama-3.2-1b": 1_235_814_400, "llama-3.2-3b": 3_212_749_824, "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496, "llama-3.1-405b": 405_853_388_800,
    "smollm-135m": 134_515_008, "smollm-360m": 361_821_120, "smollm-1.7b": 1_711_376_384,
    "mistral-7b": 7_241_732_096,
    "qwen2.5-0.5b": 494_032_768, "qwen2.5-7b": 7_615_616_512, "qwen3-0.6b": 596_049_920, "qwen3-8b": 8_190_735_360,
    "gemma-2b": 2_506_172_416, "gemma-7b": 8_537_680_896, "gemma2-2b": 2_614_341_888, "gemma2-9b": 9_241_705_984,
    "gemma2-27b": 27_227_128_320, "gemma3-1b": 999_885_952,
    "olmo-1b": 1_176_764_416, "olmo-7b": 6_888_095_744, "olmo2-7b": 7_298_617_344,
    "pythia-70m": 70_426_624, "pythia-1b": 1_011_781_632, "pythia-12b": 11_846_072_320,
    "bloom-560m": 559_214_592, "bloom-176b": 176_247_271_424,
    "command-r-35b": 34_980_831_232, "command-r-plus-104b": 103_810_674_688, "command-r7b": 8_028_033_024,
    "t5-small": 60_506_624, "t5-base": 222_903_552, "t5-11b": 11_307_321_344, "t5-v1.1-small": 76_961_152,
}


@pytest.mark.parametrize("name", TOTALS)
def test_total(name):
    assert count_parameters(archlab.get_config(name)).total == TOTALS[name]


def test_every_family_has_small_sizes():
    """A -nano for the laws and a -tiny to train, in every file of the zoo."""
    names = archlab.list_models()
    assert all(name.replace("-nano", "-tiny") in names for name in names if name.endswith("-nano"))
