"""Options of stock trainers that no training here takes."""

import pytest
from transformers import TrainingArguments

from nestling.errors import OptionError
from nestling.jobs.arguments import OURS, check_arguments


@pytest.mark.parametrize("changes", [{"fsdp": True}, {"fsdp_config": {"version": 2}}])
def test_a_model_that_is_shared_out_is_refused(changes):
    with pytest.raises(OptionError, match="each process keeps the whole model.*start it with torchrun"):
        check_arguments(changes, TrainingArguments, OURS)


@pytest.mark.parametrize("said", ["true", "1", "True"])
def test_so_is_one_that_accelerate_was_told_to_share_out(monkeypatch, said):
    check_arguments({}, TrainingArguments, OURS)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", said)
    with pytest.raises(OptionError, match="accelerate was started with FSDP: each process keeps the whole model"):
        check_arguments({}, TrainingArguments, OURS)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "false")
    check_arguments({}, TrainingArguments, OURS)
