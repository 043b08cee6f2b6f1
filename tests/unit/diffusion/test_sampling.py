"""What the front says about scheduler names and sampling options, without diffusers."""

import math
from pathlib import Path

import pytest

from services.diffusion import metadata
from services.diffusion.domain import Parameters, Sampling
from services.diffusion.sampling import check, steps_by_hand
from services.diffusion.scheduler_table import TABLE, resolve

NOISE = tuple(name for name, entry in TABLE.items() if entry.family == "noise")
FLOW = tuple(name for name, entry in TABLE.items() if entry.flow)


@pytest.mark.parametrize(
    ("asked", "meant"),
    [
        ("dpmpp_2m_karras", "dpmpp_2m_karras"),
        ("DPM++ 2M Karras", "dpmpp_2m_karras"),
        ("dpm++  2m karras ", "dpmpp_2m_karras"),
        ("DPM++ 2M SDE Karras", "dpmpp_2m_sde_karras"),
        ("DPM++ SDE", "dpmpp_sde"),
        ("DPM++ 3M SDE", "dpmpp_3m_sde"),
        ("Euler a", "euler_ancestral"),
        ("EULER A", "euler_ancestral"),
        ("LMS Karras", "lms_karras"),
        ("DPM2 a", "kdpm2_ancestral"),
        ("PLMS", "pndm"),
        ("UniPC", "unipc"),
        ("DDIM", "ddim"),
        ("LCM", "lcm"),
        ("EulerAncestralDiscreteScheduler", "euler_ancestral"),
        ("DPMSolverMultistepScheduler", "dpmpp_2m"),
        ("LMSDiscreteScheduler", "lms"),
        ("Restart", None),
        ("", None),
    ],
)
def test_names_that_people_know(asked: str, meant: str | None) -> None:
    assert resolve(asked) == meant
    assert resolve(asked, NOISE) == meant


def test_a_shared_name_means_the_one_that_the_model_can_do() -> None:
    assert resolve("Euler", NOISE) == "euler"
    assert resolve("Euler", FLOW) == "flow_euler"
    assert resolve("DPM++ 2M", FLOW) == "flow_dpmpp_2m"
    assert resolve("DPMSolverMultistepScheduler", FLOW) == "flow_dpmpp_2m"
    # The table's own name means itself, so that the caller hears why it does not fit.
    assert resolve("euler", FLOW) == "euler"
    assert resolve("Euler a", FLOW) == "euler_ancestral"
    # A model's own scheduler that the table lacks goes by its class.
    assert resolve("EulerDiscreteScheduler", ("EulerDiscreteScheduler", "ddim")) == "EulerDiscreteScheduler"


def test_the_file_names_the_sampler_as_others_do_and_is_understood_again() -> None:
    for name, entry in TABLE.items():
        parameters = Parameters("m", "a cat", "", 64, 64, 20, 7.5, name, 1)
        line = metadata.infotext(parameters).splitlines()[-1]
        sampler = line.split("Sampler: ")[1].split(",")[0]
        family = tuple(other for other in TABLE if TABLE[other].family == entry.family)
        assert resolve(sampler, family) == name
    assert "Sampler: DPM++ 2M Karras," in metadata.infotext(
        Parameters("m", "a cat", "", 64, 64, 20, 7.5, "dpmpp_2m_karras", 1)
    )
    assert "Sampler: HomeMadeScheduler," in metadata.infotext(
        Parameters("m", "a cat", "", 64, 64, 20, 7.5, "HomeMadeScheduler", 1)
    )


def test_the_page_on_schedulers_lists_what_the_table_has() -> None:
    page = (Path(__file__).resolve().parents[3] / "docs" / "schedulers.md").read_text()
    short = {"sigma_schedule": "schedule", "timestep_spacing": "spacing", "prediction_type": "prediction"}
    for entry in TABLE.values():
        takes = ", ".join(short.get(option, option) for option in entry.sampling_options) or "–"
        assert f"| `{entry.name}` | {', '.join(entry.aliases)} | `{entry.diffusers_class}` | {takes} |" in page


@pytest.mark.parametrize("name", TABLE)
def test_without_options_nothing_is_wrong(name: str) -> None:
    assert check(TABLE[name], Sampling(), 200) == []


@pytest.mark.parametrize(
    ("name", "sampling"),
    [
        ("euler", Sampling(sigma_schedule="beta", timestep_spacing="trailing", prediction_type="sample")),
        ("euler", Sampling(timesteps=(999, 500, 0))),
        ("euler", Sampling(sigmas=(14.6, 3.0, 0.03, 0.0))),
        ("euler_karras", Sampling(sigma_schedule="exponential", timestep_spacing="leading")),
        ("ddim", Sampling(eta=1.0)),
        ("tcd", Sampling(eta=0.0, timesteps=(999, 1))),
        ("dpmpp_2m", Sampling(timesteps=(999, 1), prediction_type="v_prediction")),
        ("flow_euler", Sampling(sigmas=(1.0, 0.5), prediction_type=None)),
        ("flow_lcm", Sampling(sigma_schedule="karras")),
    ],
)
def test_what_applies_passes(name: str, sampling: Sampling) -> None:
    assert check(TABLE[name], sampling, 200) == []


@pytest.mark.parametrize(
    ("name", "sampling", "field", "said"),
    [
        ("ddim", Sampling(sigma_schedule="karras"), "sampling.sigma_schedule", "schedulers that do: lms"),
        ("dpmpp_2s", Sampling(timestep_spacing="leading"), "sampling.timestep_spacing", "schedulers that do: ddim"),
        ("euler", Sampling(eta=0.5), "sampling.eta", "schedulers that do: ddim, tcd"),
        ("ddim", Sampling(eta=1.5), "sampling.eta", "0 to 1"),
        ("ddim", Sampling(eta=math.nan), "sampling.eta", "0 to 1"),
        ("flow_euler", Sampling(prediction_type="epsilon"), "sampling.prediction_type", "no scheduler for this kind"),
        ("flow_euler", Sampling(timesteps=(999, 0)), "sampling.timesteps", "no scheduler for this kind"),
        ("flow_heun", Sampling(sigmas=(1.0, 0.5)), "sampling.sigmas", "flow_euler, flow_lcm"),
        ("kdpm2", Sampling(prediction_type="sample"), "sampling.prediction_type", "epsilon, v_prediction"),
        ("dpmpp_2m_karras", Sampling(timesteps=(999, 0)), "sampling.timesteps", "dpmpp_2m, "),
        ("dpmpp_2m_karras", Sampling(timestep_spacing="leading"), "sampling.timestep_spacing", "dpmpp_2m, "),
        (
            "dpmpp_2m",
            Sampling(timestep_spacing="leading", sigma_schedule="beta"),
            "sampling.timestep_spacing",
            "no effect on dpmpp_2m",
        ),
        ("dpmpp_2m", Sampling(sigmas=(9.0, 1.0)), "sampling.sigmas", "schedulers that do: euler"),
        ("euler", Sampling(sigma_schedule="beta", sigmas=(9.0, 1.0)), "sampling.sigma_schedule", "one of the two"),
        ("ddpm", Sampling(timestep_spacing="leading", timesteps=(9,)), "sampling.timestep_spacing", "one of the two"),
        ("euler", Sampling(timesteps=(9, 1), sigmas=(9.0, 1.0)), "sampling.sigmas", "one of the two"),
        ("euler", Sampling(timesteps=(999, 500, 500, 1)), "sampling.timesteps[2]", "falling"),
        ("euler", Sampling(timesteps=(1000, 1)), "sampling.timesteps[0]", "0 to 999"),
        ("euler", Sampling(timesteps=(5, -1)), "sampling.timesteps[1]", "0 to 999"),
        ("euler", Sampling(sigmas=(9.0, 9.5)), "sampling.sigmas[1]", "falling"),
        ("euler", Sampling(sigmas=(9.0, 0.0, 0.0)), "sampling.sigmas[2]", "falling"),
        ("euler", Sampling(sigmas=(9.0, math.nan)), "sampling.sigmas[1]", "0 to 10000"),
        ("euler", Sampling(sigmas=(math.inf, 1.0)), "sampling.sigmas[0]", "0 to 10000"),
        ("euler", Sampling(sigmas=(9.0, -1.0)), "sampling.sigmas[1]", "0 to 10000"),
        ("euler", Sampling(sigmas=(0.0,)), "sampling.sigmas[0]", "more than 0"),
        ("flow_euler", Sampling(sigmas=(1.5, 0.5)), "sampling.sigmas[0]", "0 to 1"),
        ("euler", Sampling(timesteps=tuple(range(900, 0, -1))), "sampling.timesteps", "1 to 200"),
    ],
)
def test_what_does_not_apply_is_said_with_what_would(name: str, sampling: Sampling, field: str, said: str) -> None:
    violations = check(TABLE[name], sampling, 200)
    assert [violation.field for violation in violations] == [field]
    assert said in violations[0].description


def test_a_schedule_in_another_length_has_other_bounds() -> None:
    assert check(TABLE["euler"], Sampling(timesteps=(500,)), 200, 500)[0].description.endswith("0 to 499")


def test_steps_by_hand_replace_the_step_count() -> None:
    assert steps_by_hand(Sampling()) is None
    assert steps_by_hand(Sampling(timesteps=(999, 0))) == 2
    assert steps_by_hand(Sampling(sigmas=(9.0, 3.0, 0.0))) == 2  # 0 ends the last step
    by_hand = Sampling(timesteps=(999, 0))
    assert check(TABLE["euler"], by_hand, 200, step_count=2) == []
    (violation,) = check(TABLE["euler"], by_hand, 200, step_count=20)
    assert violation.field == "step_count"
    assert "leave it unset or 2" in violation.description


def test_a_models_own_scheduler_outside_the_table_takes_no_options() -> None:
    assert check(None, Sampling(), 200) == []
    (violation,) = check(None, Sampling(eta=0.5), 200)
    assert "schedulers that do: ddim, tcd" in violation.description
