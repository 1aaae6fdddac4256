from __future__ import annotations

import copy
import re
import sys
import urllib.error
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from crqat.core.errors import ToolError, UsageError
from crqat.train.config import QuantizationConfig
from crqat.train.data import sources
from crqat.train.data.batches import evaluation_batches
from crqat.train.graph.operations import trace
from crqat.train.models import build as models
from crqat.train.models import cifar, own_network
from crqat.train.quantized_model import quantize_model
from crqat.train.quantizers import METHODS
from tests.hostile_pickle import Hostile, load_without_care
from tests.needs import require


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(0)
    return models.build("cifar/resnet20", 10, 1).eval()


def same_output(a: nn.Module, b: nn.Module) -> bool:
    x = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        return torch.equal(a.eval()(x), b.eval()(x))


def test_published_resnet20_weights_keep_their_accuracy(shared_data: Path, cifar10_root: Path) -> None:
    dataset = sources.load("cifar10", str(cifar10_root), download=False)
    model = models.build("cifar/resnet20", 10, 3)
    models.load_weights(model, shared_data / "weights" / "resnet20-12fca82f.th")
    model.eval()
    with torch.inference_mode():
        made = evaluation_batches(dataset.test_images[:1000], dataset.preprocessing, 250)
        predicted = torch.cat([model(batch).argmax(1) for batch in made])
    # 91.73 % on all 10,000 images, 91.5 % on these; a wrong shortcut or normalization costs several points.
    assert (predicted == dataset.test_labels[:1000]).float().mean() > 0.91


def test_published_resnet56_weights_fit(shared_data: Path) -> None:
    model = models.build("cifar/resnet56", 10, 3)
    before = model.state_dict()["layer3.8.conv2.weight"].clone()
    models.load_weights(model, shared_data / "weights" / "resnet56-4bfd9763.th")
    assert not torch.equal(model.state_dict()["layer3.8.conv2.weight"], before)


def test_the_shortcut_subsamples_and_pads_with_zeros() -> None:
    block = cifar.BasicBlock(16, 32, stride=2).eval()
    nn.init.zeros_(block.bn2.weight)  # leaves the shortcut alone
    x = torch.rand(2, 16, 7, 8)
    out = block(x)
    assert list(out.shape) == [2, 32, 4, 4]
    assert torch.equal(out[:, 8:24], x[:, :, ::2, ::2])
    assert not out[:, :8].any()
    assert not out[:, 24:].any()


def test_resnet20_is_traced_by_fx_and_takes_any_image_size(net: nn.Module) -> None:
    traced = torch.fx.symbolic_trace(net)
    assert same_output(net, traced)
    x = torch.rand(3, 1, 32, 28)
    with torch.inference_mode():
        assert list(traced(x).shape) == [3, 10]
        assert torch.equal(traced(x), net(x))


def test_new_weights_keep_the_variance_of_the_signal() -> None:
    torch.manual_seed(0)
    model = models.build("cifar/resnet20", 10, 3)
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            fan_in = module.weight[0].numel()
            assert module.weight.std().item() == pytest.approx((2 / fan_in) ** 0.5, rel=0.15), name


def test_a_torchvision_network_by_name() -> None:
    model = models.build("torchvision/mobilenet_v2", 7, 3).eval()
    with torch.inference_mode():
        assert list(model(torch.rand(1, 3, 32, 32)).shape) == [1, 7]


def test_a_torchvision_network_of_grey_images_starts_as_the_one_of_three_equal_channels() -> None:
    built = []
    for channels in (1, 3):
        torch.manual_seed(0)
        built.append(models.build("torchvision/squeezenet1_1", 10, channels).eval())
    x = torch.rand(2, 1, 48, 48)
    with torch.inference_mode():
        torch.testing.assert_close(built[0](x), built[1](x.expand(2, 3, 48, 48)), rtol=1e-4, atol=1e-5)
    assert built[0](x).shape == (2, 10)
    weight = torch.rand(2, 3, 1, 1)
    assert torch.equal(models.of_channels(weight, 4)[:, 3], weight[:, 0] * 0.75)


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("cifar/resnet21", "cifar/resnet20"),
        ("resnet20", "cifar/resnet20"),
        ("resnet18", "torchvision/resnet18"),
        ("torchvision/mobilenetv2", "torchvision/mobilenet_v2"),
        ("torchvision/fcn_resnet50", "torchvision/resnet50"),
    ],
)
def test_an_unknown_name_brings_the_nearest_known(name: str, nearest: str) -> None:
    with pytest.raises(UsageError, match=rf'^model\.name: "{name}" .*did you mean "{nearest}"\?$'):
        models.build(name, 10, 3)


@pytest.mark.parametrize("name", ["torchvision/googlenet", "torchvision/inception_v3"])
def test_auxiliary_heads_are_left_out(name: str) -> None:
    model = models.build(name, 10, 3).train()
    assert not any("aux" in key.lower() for key in model.state_dict())
    assert model(torch.randn(2, 3, 96, 96)).shape == (2, 10)  # logits alone, in training too
    with pytest.raises(UsageError, match=rf"^model\.weights: the published weights of {name} need a second norm"):
        models.pretrained(name, 1000, 3)


USER_MODULE = """
from torch import nn

def network(classes, channels): return nn.Sequential(nn.Flatten(), nn.Linear(channels * 4, classes))
def wrong(classes, channels): return "network"
def more(classes, depth): return nn.Identity()
def nothing(): return network(5, 2)
def others(width=1, **further): return network(**further)
def fails(classes): raise KeyError("stem")
instance = nn.Identity()
class Net(nn.Module):
    def __init__(self, in_chans=3, num_classes=1000):
        super().__init__()
        self.classifier = nn.Linear(in_chans * 4, num_classes)
    def forward(self, x): return self.classifier(x.flatten(1))
"""


@pytest.fixture
def _user_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "user_network.py").write_text(USER_MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    monkeypatch.delitem(sys.modules, "user_network", raising=False)


@pytest.mark.usefixtures("_user_folder")
@pytest.mark.parametrize("function", ["network", "nothing", "others", "Net"])
def test_a_users_function_or_class_builds_the_network(function: str) -> None:
    own_network.check_callable(f"user_network:{function}")
    assert list(models.build(f"user_network:{function}", 5, 2)(torch.rand(1, 2, 2, 2)).shape) == [1, 5]


@pytest.mark.usefixtures("_user_folder")
@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("wrong", r"must return a torch\.nn\.Module, got str"),
        ("fails", r"raised KeyError: 'stem', .*user_network\.py:9$"),
    ],
)
def test_a_users_function_that_does_not_fit_is_named(function: str, message: str) -> None:
    with pytest.raises(UsageError, match=rf"^model\.name: .*{message}"):
        models.build(f"user_network:{function}", 5, 2)


@pytest.mark.usefixtures("_user_folder")
@pytest.mark.parametrize(
    ("function", "message"),
    [
        (
            "more",
            r"must be callable as more\(classes=, channels=\), more\(num_classes=\) or more\(\) \(.*'depth'\); give",
        ),
        ("absent", "has no function or class 'absent'"),
        (
            "instance",
            r"is a network, not a function or class that makes one; name its class, or "
            r"`def build\(\): return instance`",
        ),
    ],
)
def test_what_cannot_be_called_is_told_without_a_call(function: str, message: str) -> None:
    with pytest.raises(UsageError, match=rf"^model\.name: .*{message}"):
        own_network.check_callable(f"user_network:{function}")


def without_counts(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value for key, value in state.items() if not key.endswith("num_batches_tracked")}


@pytest.mark.parametrize("file", ["plain.safetensors", "plain.pth", "wrapped.pt", "parallel.th", "model.pth"])
def test_weights_survive_each_kind_of_file(net: nn.Module, tmp_path: Path, file: str) -> None:
    state, path = net.state_dict(), tmp_path / file
    if file == "plain.safetensors":
        safetensors.torch.save_file(state, path)
    elif file == "parallel.th":
        renamed = {f"module.{key}": value for key, value in without_counts(state).items()}
        torch.save({"state_dict": renamed, "epoch": 3}, path, _use_new_zipfile_serialization=False)
    else:
        torch.save({"wrapped.pt": {"state_dict": state}, "model.pth": {"model": state}}.get(file, state), path)
    fresh = models.build("cifar/resnet20", 10, 1)
    assert not same_output(fresh, net)
    models.load_weights(fresh, path)
    assert same_output(fresh, net)


def test_a_submodule_that_is_called_module_keeps_its_name(tmp_path: Path) -> None:
    def build() -> nn.Module:
        return nn.ModuleDict({"module": nn.Linear(2, 2)})

    torch.manual_seed(0)
    source, target = build(), build()
    torch.save(source.state_dict(), tmp_path / "w.pth")
    models.load_weights(target, tmp_path / "w.pth")
    assert torch.equal(target.state_dict()["module.weight"], source.state_dict()["module.weight"])


def test_weights_that_do_not_fit_are_named_and_change_nothing(net: nn.Module, tmp_path: Path) -> None:
    state = without_counts(net.state_dict())
    state = {key: value + 1 for key, value in state.items() if not key.startswith("layer1.0")}
    state["conv1.weight"] = torch.zeros(16, 3, 3, 3)
    state["head.bias"] = torch.zeros(4)
    torch.save(state, tmp_path / "w.pth")
    before = {key: value.clone() for key, value in net.state_dict().items()}
    with pytest.raises(UsageError) as caught:
        models.load_weights(net, tmp_path / "w.pth")
    assert str(caught.value) == (
        f"model.weights: {tmp_path}/w.pth does not fit the network in model.name: "
        "10 missing (layer1.0.conv1.weight, layer1.0.bn1.weight, layer1.0.bn1.bias, ...); 1 unexpected (head.bias); "
        "1 wrong shape (conv1.weight [16, 3, 3, 3] instead of [16, 1, 3, 3])"
    )
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())


@pytest.mark.parametrize("zipped", [True, False])
def test_a_file_that_would_run_a_command_is_refused_and_did_not_run(
    net: nn.Module, tmp_path: Path, zipped: bool
) -> None:
    marker, path = tmp_path / "the file ran", tmp_path / "w.pth"
    torch.save({"state_dict": Hostile(marker)}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(UsageError, match=r"^model\.weights: .* needs code to load \(\w+\.system\) and is refused"):
        models.load_weights(net, path)
    assert not marker.exists()
    load_without_care(path, "torch")
    assert marker.exists()


def test_a_file_with_a_whole_network_is_refused(net: nn.Module, tmp_path: Path) -> None:
    torch.save(net, tmp_path / "w.pth")
    with pytest.raises(
        UsageError, match=r"needs code to load \(.*CifarResNet\) and is refused; save model\.state_dict"
    ):
        models.load_weights(net, tmp_path / "w.pth")


@pytest.mark.parametrize("file", ["w.pth", "legacy.th", "w.safetensors"])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.999])
def test_a_truncated_file_is_called_damaged(net: nn.Module, tmp_path: Path, file: str, share: float) -> None:
    path = tmp_path / file
    if path.suffix == ".safetensors":
        safetensors.torch.save_file(net.state_dict(), path)
    else:
        torch.save(net.state_dict(), path, _use_new_zipfile_serialization=file == "w.pth")
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(UsageError, match=r"^model\.weights: .* is (damaged|not a file of tensors)") as caught:
        models.load_weights(net, path)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


def test_other_files_are_refused_by_what_they_are(net: nn.Module, tmp_path: Path) -> None:
    (tmp_path / "page.pth").write_text("<!DOCTYPE html><html>not found</html>")
    torch.save({"optimizer": {"state": {}}, "epoch": 3}, tmp_path / "unrelated.pth")
    (tmp_path / "net.onnx").write_bytes(b"")
    torch.save([torch.zeros(2)], tmp_path / "list.pth")
    torch.save({"epoch": 3}, tmp_path / "numbers.pth")
    for name, message in {
        "page.pth": "is not a file of tensors",
        "net.onnx": "is not one of .safetensors, .pth, .pt, .th",
        "list.pth": "holds no state dict",
        "numbers.pth": "holds no state dict",
        "unrelated.pth": r"holds no state dict .* optimizer \(1 entries\), epoch \(int\)",
        "absent.pth": "correct the path, or leave model.weights out",
    }.items():
        with pytest.raises(UsageError, match=rf"^model\.weights: .*{name}.*{message}"):
            models.load_weights(net, tmp_path / name)


@pytest.mark.parametrize(("name", "parameters"), [("cifar/resnet18", 11_173_962), ("cifar/mobilenet_v2", 2_236_682)])
def test_networks_with_a_small_stem_keep_the_resolution_that_small_images_have(name: str, parameters: int) -> None:
    model = models.build(name, 10, 3).eval()
    assert sum(p.numel() for p in model.parameters()) == parameters
    seen: list[torch.Size] = []
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda _, inputs, output: seen.append(output.shape[2:]))
    with torch.no_grad():
        assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
    assert seen[0] == (32, 32)
    assert seen[-1] == (4, 4)
    assert models.build(name, 7, 1)(torch.zeros(2, 1, 32, 32)).shape == (2, 7)


@pytest.mark.parametrize(("name", "quantizers"), [("resnet18", 51), ("mobilenetv2_100", 117)])
def test_timms_networks_are_mapped(name: str, quantizers: int) -> None:
    require("timm")
    torch.manual_seed(0)
    model = models.build(f"timm/{name}", 10, 3).eval()
    x = torch.rand(2, 3, 64, 64)
    student = quantize_model(model, x, QuantizationConfig(), ("onnxruntime", "tensorrt"), METHODS["lsq"])
    specs = student.specs
    assert len(specs) == quantizers  # as many as NNCF places (measured with stock NNCF)
    with torch.inference_mode():
        assert torch.equal(trace(copy.deepcopy(model))(x), model(x))
    with torch.inference_mode():
        assert student(x).shape == model(x).shape == (2, 10)


def test_an_unknown_network_of_timm_brings_the_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    require("timm")
    with pytest.raises(UsageError, match=r'^model\.name: timm has no "resnet81"; did you mean "timm/resnet\w+"\?$'):
        models.build("timm/resnet81", 10, 3)
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ToolError, match=r"needs timm; pip install crqat-edge\[timm\]$") as caught:
        models.build("timm/resnet18", 10, 3)
    assert caught.value.exit_code == 3


@pytest.mark.parametrize("classes", [1000, 7])
def test_published_weights_leave_the_classifier_of_other_classes_new(
    monkeypatch: pytest.MonkeyPatch, classes: int
) -> None:
    torch.manual_seed(3)
    published = models.build("torchvision/mobilenet_v2", 1000, 3).state_dict()
    asked: list[tuple[str, dict[str, Any]]] = []

    def fetch(url: str, **options: Any) -> dict[str, Tensor]:
        asked.append((url, options))
        return published

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", fetch)
    model, new = models.pretrained("torchvision/mobilenet_v2", classes, 3)
    assert new == (classes == 7)
    ((url, options),) = asked
    # The hash is part of the file's name and is checked; nothing in the file can run.
    assert re.fullmatch(r"https://.*-[0-9a-f]{8}\.pth", url)
    assert options["check_hash"] is True and options["weights_only"] is True
    state = model.state_dict()
    differing = {key for key, value in published.items() if not torch.equal(state[key], value)} if not new else set()
    assert not differing
    assert torch.equal(state["features.18.0.weight"], published["features.18.0.weight"])
    assert state["classifier.1.weight"].shape == (classes, 1280)
    grey, again = models.pretrained("torchvision/mobilenet_v2", classes, 1)
    stem = published["features.0.0.weight"].sum(1, keepdim=True)
    assert again == new and torch.equal(grey.state_dict()["features.0.0.weight"], stem)


def test_weights_that_cannot_be_fetched_are_the_environments_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        msg = "no route to host"
        raise urllib.error.URLError(msg)

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", fail)
    with pytest.raises(
        ToolError, match=r"^model\.weights: cannot fetch the weights of torchvision/resnet18 .*no route"
    ):
        models.pretrained("torchvision/resnet18", 10, 3)
    with pytest.raises(UsageError, match=r'^model\.weights: "pretrained" is for torchvision/NAME and timm/NAME'):
        models.pretrained("cifar/resnet20", 10, 3)
