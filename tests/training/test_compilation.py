import pytest
import torch

from headway.errors import TrainingError
from headway.training import compilation
from headway.training.compilation import LayerCompiler, has_cpp_compiler
from headway.training.events import Notice
from headway.training.loop import train
from small_runs import assert_same_run, lines, tiny_model

needs_compiler = pytest.mark.skipif(not has_cpp_compiler(), reason="no C++ compiler here")


def notices_of(config):
    notices = []
    train(config, on_event=lambda event: notices.append(event.text) if isinstance(event, Notice) else None)
    return notices


def test_without_a_compiler_auto_runs_eagerly_and_says_so(make_config, tmp_path, monkeypatch):
    monkeypatch.setattr(compilation.shutil, "which", lambda name: None)
    assert any("uncompiled" in text and "C++" in text for text in notices_of(make_config("auto", compile="auto")))
    assert notices_of(make_config("off", compile="off")) != []
    assert_same_run(tmp_path / "auto", tmp_path / "off", step=6)


def test_without_a_compiler_on_is_refused(make_config, monkeypatch):
    monkeypatch.setattr(compilation.shutil, "which", lambda name: None)
    with pytest.raises(TrainingError, match=r"compile=on.*--compile off"):
        train(make_config(compile="on"))


def test_a_toolchain_that_fails_is_told_and_auto_runs_eagerly(make_config, monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("Python.h: No such file or directory")

    monkeypatch.setattr(compilation.torch, "compile", broken)
    monkeypatch.setattr(compilation, "has_cpp_compiler", lambda: True)
    assert any("uncompiled" in text and "Python.h" in text for text in notices_of(make_config(compile="auto")))


def test_layers_are_eager_outside_the_block_and_state_is_untouched(monkeypatch):
    monkeypatch.setattr(compilation.torch, "compile", lambda function, dynamic: lambda *a, **k: function(*a, **k))
    model = tiny_model()
    layers = [*model.family.layers, *model.heads]
    keys = list(model.state_dict())
    compiler = LayerCompiler(layers)
    assert all("forward" not in vars(layer) for layer in layers)
    with compiler.active():
        assert all("forward" in vars(layer) for layer in layers)
        assert list(model.state_dict()) == keys
    assert all("forward" not in vars(layer) for layer in layers)


def test_layers_are_eager_again_after_an_error_in_the_block(monkeypatch):
    monkeypatch.setattr(compilation.torch, "compile", lambda function, dynamic: lambda *a, **k: 1 / 0)
    layers = list(tiny_model().family.layers)
    with LayerCompiler(layers).active(), pytest.raises(ZeroDivisionError):
        layers[0](torch.zeros(1, 2, 32))
    assert all("forward" not in vars(layer) for layer in layers)


@needs_compiler
@pytest.mark.slow
def test_compiled_layers_train_like_eager_ones_and_resume_bit_for_bit(make_config, tmp_path):
    torch.compiler.reset()
    train(make_config("eager"))
    assert any("layers compiled" in text for text in notices_of(make_config("compiled", compile="on")))
    eager, compiled = (lines(tmp_path / name / "metrics.jsonl") for name in ("eager", "compiled"))
    for left, right in zip(eager, compiled, strict=True):
        assert right["loss_per_offset"] == pytest.approx(left["loss_per_offset"], rel=1e-4)
        assert right["gradient_norm"] == pytest.approx(left["gradient_norm"], rel=1e-3)
    again = make_config("again", compile="on", steps=6)

    def stop(event):
        if getattr(event, "step", None) == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(again, on_event=stop)
    train(again)
    assert_same_run(tmp_path / "compiled", tmp_path / "again", step=6)
