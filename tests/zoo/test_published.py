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

# Mixtures of experts: the total, what is active, and that without a table that is looked up only (gpt-oss's card).
# DeepSeek-V3 and Kimi K2 are without what predicts a second token; Llama 4 is without its vision part.
EXPERTS = {
    "mixtral-8x7b": (46_702_792_704, 12_879_925_248, 12_748_853_248),
    "mixtral-8x22b": (140_630_071_296, 39_161_468_928, 38_960_142_336),
    "qwen3-30b-a3b": (30_532_122_624, 3_353_032_704, 3_041_867_776),
    "qwen3-235b-a22b": (235_093_634_560, 22_190_763_520, 21_568_433_664),
    "llama4-scout": (107_769_861_120, 17_172_894_720, 16_138_408_960),
    "llama4-maverick": (400_711_848_960, 17_184_691_200, 16_150_205_440),
    "deepseek-v2": (235_741_434_880, 21_375_800_320, 20_851_512_320),
    "deepseek-v2-lite": (15_706_484_224, 2_661_150_208, 2_451_435_008),
    "deepseek-v3": (671_026_419_200, 37_552_297_472, 36_625_618_432),
    "kimi-k2": (1_026_408_232_448, 32_861_500_928, 31_687_095_808),
    "gpt-oss-20b": (20_914_757_184, 4_187_440_704, 3_608_307_264),
    "gpt-oss-120b": (116_829_156_672, 5_711_982_912, 5_132_849_472),
}
# Published as rounded: total and active in billions.
ROUNDED = {
    "deepseek-moe-16b": (16.4, 2.8), "olmoe-1b-7b": (6.9, 1.3), "qwen1.5-moe-a2.7b": (14.3, 2.7),
    "switch-base-128": (7.4, None), "switch-large-128": (26.3, None), "switch-xxl-128": (395, None),
    "switch-c-2048": (1571, None), "glam-1.7b-64e": (27, 1.879), "glam-8b-64e": (143, 9.8),
    "glam-64b-64e": (1162, 96.6),
}


@pytest.mark.parametrize("name", TOTALS)
def test_total(name):
    assert count_parameters(archlab.get_config(name)).total == TOTALS[name]


@pytest.mark.parametrize("name", EXPERTS)
def test_experts(name):
    counted = count_parameters(archlab.get_config(name))
    assert (counted.total, counted.active, counted.active_computing) == EXPERTS[name]


@pytest.mark.parametrize("name", ROUNDED)
def test_rounded(name):
    counted, (total, active) = count_parameters(archlab.get_config(name)), ROUNDED[name]
    assert counted.total / 1e9 == pytest.approx(total, rel=0.01)
    assert active is None or counted.active / 1e9 == pytest.approx(active, rel=0.02)


def test_every_family_has_small_sizes():
    """A -nano for the laws and a -tiny to train, in every file of the zoo."""
    names = archlab.list_models()
    assert all(name.replace("-nano", "-tiny") in names for name in names if name.endswith("-nano"))
