"""The `train` stage's part of a recipe. Imports nothing heavy, so that a recipe is checked in an instant."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

from crqat.core.field_bounds import STRICT, OneOf, Range
from crqat.core.targets import ByTarget, TargetName

Bits = Annotated[int, Range(ge=2, le=8)]
Target = Annotated[str, TargetName()]
# Of images in folders, where the recipe does not say: what ImageNet's networks were evaluated with.
FOLDER_SIZE, FOLDER_CROP = 256, 224
Interpolation = Literal["bilinear", "bicubic", "lanczos", "nearest"]
FILE_SOURCES = ("imagefolder", "imagelist", "webdataset", "huggingface")
# Sources whose images are RGB unless `data.channels` says otherwise.
COLOUR_SOURCES = (*FILE_SOURCES, "cifar10", "cifar100")


def source_kind(source: str | None) -> str | None:
    """A source without the name behind "huggingface:"."""
    return "huggingface" if source is not None and source.startswith("huggingface:") else source


def is_onnx_file(model_name: str) -> bool:
    """Whether `model.name` is the path of an ONNX file, which has the network and its weights."""
    return model_name.lower().endswith(".onnx")


@dataclass(frozen=True)
class DataConfig:
    """Where the images come from and how they are augmented.

    Attributes:
        source: "digits", "cifar10", "cifar100", "imagefolder", "imagelist", "webdataset", "huggingface",
            "huggingface:NAME", or "package.module:function" that returns a `crqat.train.data.dataset.Dataset`.
        root: Folder of an on-disk source; of "imagefolder" the one with train/CLASS/* and test/CLASS/* (or val/), of
            "webdataset" the one with train-*.tar and test-*.tar, of "huggingface" one that `save_to_disk` wrote.
        image_list: Of "imagelist": the JSON file that names its images and their classes; see
            `crqat.train.data.imagelist.ImageList`. Paths in it are relative to `root`.
        download: Fetch the data set into `root` if it is not there.
        unlabeled: A further source of the same kinds whose training images are used without their labels, by the
            consistency term alone.
        unlabeled_root: Its folder, None for `root`. Of "imagefolder" any folder: all images in it and below it are
            taken, in class folders or not.
        unlabeled_ratio: Unlabeled images in a training step for each labeled one; 0 leaves them out.
        labeled: Keep the labels of so many training images, as many of each class as there are, drawn with the recipe's
            seed; validation images are among them. The others are unlabeled. None keeps all labels.
        validation: Share of the training images held out for selection, drawn with the recipe's seed.
        crop_padding: Random crop after padding each side by this many pixels; 0 switches it off.
        flip: Random horizontal flip.
        strong: "randaugment" shows the student a strongly changed view of all images in QAT
            (`train.data.augment.strong_view`), the teacher a weak one; "none" shows both weak ones.
        size: Of stored images (FILE_SOURCES): resize the shorter side to so many pixels; None is 256.
        crop: Of stored images: cut a square of so many pixels out of the centre; None is 224.
        channels: Of stored images and CIFAR: 3 is RGB, 1 is grey; None is 3.
        interpolation: Of stored images: how they are resized; None is "bilinear". With `model.weights: pretrained`,
            size, crop, interpolation, mean and std that are None are those published with these weights.
        convert: Of stored images: turn those of another mode (grey, palette, CMYK; colours where `channels` is 1) into
            RGB or grey instead of refusing them.
        image_column: Of "huggingface"; None takes the only column of images.
        label_column: Of "huggingface"; None takes the only column of class labels, or the one called "label".
        mean: Of each channel, in units of 0..1; None is the source's own.
        std: Likewise.
    """

    __pydantic_config__: ClassVar[Any] = STRICT
    source: str
    root: str | None = None
    image_list: str | None = None
    download: bool = False
    unlabeled: str | None = None
    unlabeled_root: str | None = None
    unlabeled_ratio: Annotated[float, Range(ge=0)] = 1.0
    labeled: Annotated[int, Range(ge=2)] | None = None
    validation: Annotated[float, Range(gt=0, lt=1)] = 0.1
    crop_padding: Annotated[int, Range(ge=0)] = 4
    flip: bool = True
    strong: Literal["none", "randaugment"] = "none"
    size: Annotated[int, Range(ge=1)] | None = None
    crop: Annotated[int, Range(ge=1)] | None = None
    channels: Literal[1, 3] | None = None
    interpolation: Interpolation | None = None
    convert: bool = False
    image_column: str | None = None
    label_column: str | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None


@dataclass(frozen=True)
class ModelConfig:
    """The float network.

    Attributes:
        name: "cifar/resnet20" and its kin, "torchvision/NAME", "timm/NAME", or "package.module:function", a function or
            class that is called with `classes` (or `num_classes`) and `channels` (or `in_channels`, `in_chans`), as far
            as it has such parameters; or the path of a float ONNX file, which brings its weights.
        weights: A checkpoint: .safetensors, .pth, .pt, .th, .ckpt, .bin or .pth.tar; "pretrained" takes what
            torchvision or timm publish, and trains on by the `float` section if there is one; None trains the float
            network by the `float` section, or leaves an ONNX file's weights as they are.
        nncf: A folder of `crqat nncf import`: float weights and ranges of a network that stock NNCF has quantized, in
            place of `weights` and of calibration.
        weights_key: Where in `weights` the state dict lies, such as "state_dict_ema"; None takes the only one that
            fits.
        accuracy: Share of the test images that the float network is known to answer rightly, such as 0.9173. The gate
            fails if it is shown to be further below than `gate.max_accuracy_drop`; nothing else depends on it.
    """

    __pydantic_config__: ClassVar[Any] = STRICT
    name: str
    weights: str | None = None
    nncf: str | None = None
    weights_key: str | None = None
    accuracy: Annotated[float, Range(gt=0, le=1)] | None = None

    @property
    def has_weights(self) -> bool:
        """Whether a file brings the float network's weights, so that nothing is drawn and nothing fetched."""
        return self.weights not in (None, "pretrained") or self.nncf is not None or is_onnx_file(self.name)


@dataclass(frozen=True)
class OptimizerConfig:
    """One training by SGD with Nesterov momentum 0.9.

    The learning rate is warmed up linearly over 5 % of the steps and then follows a cosine to zero.

    Attributes:
        epochs: Passes over the training images.
        batch_size: Images a step, of all processes together.
        lr: Peak learning rate.
        weight_decay: On convolution and linear weights; never on biases, BN or quantizer scales.
        precision: Type of convolutions and linear layers in training, by autocast; weights, quantizers and everything
            that is evaluated or written are float32.
    """

    __pydantic_config__: ClassVar[Any] = STRICT
    epochs: Annotated[int, Range(ge=0)] = 10
    batch_size: Annotated[int, Range(ge=1)] = 128
    lr: Annotated[float, Range(gt=0)] = 0.1
    weight_decay: Annotated[float, Range(ge=0)] = 5e-4
    precision: Literal["float32", "bfloat16"] = "float32"


@dataclass(frozen=True)
class ConsistencyConfig:
    """The consistency term (arXiv 2402.13497): L = CE + lambda(t) KL(teacher || student).

    Attributes:
        teacher: "ema" of the student, the frozen "float" network, or "none" for plain QAT. "pseudo-label" is no teacher
            in the loop: the float network labels the unlabeled images once, as they are, and the term is the
            cross-entropy with these labels.
        weight: lambda_max; 0 with the "ema" teacher is plain QAT beside an average of its weights.
        ramp_up: Share of the steps over which lambda rises to `weight` as exp(-5 (1 - t/T)^2).
        temperature: Of both softmaxes; the term is multiplied by its square.
        ema_decay: Largest alpha of theta' = alpha theta' + (1 - alpha) theta; step t uses min(1 - 1/(t+1), alpha).
    """

    __pydantic_config__: ClassVar[Any] = STRICT
    teacher: Literal["ema", "float", "pseudo-label", "none"] = "ema"
    weight: Annotated[float, Range(ge=0)] = 1.0
    ramp_up: Annotated[float, Range(ge=0, le=1)] = 0.3
    temperature: Annotated[float, Range(gt=0)] = 1.0
    ema_decay: Annotated[float, Range(ge=0, lt=1)] = 0.99


@dataclass(frozen=True)
class FloatConfig(OptimizerConfig):
    """The training of the float network.

    Attributes:
        fine_tune: Train on from the weights that `model.weights` names, which else stay as they are.
        strong: As `data.strong`, in this training.
        consistency: The consistency term in this training, as the recipe's section of that name is in QAT: a teacher
            that is the average of the float network, on unlabeled images if there are any. The network or its teacher
            is kept, whichever is better on the validation images. None trains without.
    """

    fine_tune: bool = False
    strong: Literal["none", "randaugment"] = "none"
    consistency: ConsistencyConfig | None = None


@dataclass(frozen=True)
class QATConfig(OptimizerConfig):
    """The training of the quantized network, which starts from a trained one: with a smaller learning rate.

    Attributes:
        epochs: 0 is post-training quantization.
        lr: Peak learning rate.
        bn_images: Training images from which BN statistics are estimated anew before delivery, with the quantizers on
            (arXiv 2203.11086 needs it for depthwise layers of few bits); 0 keeps those of the training.
        freeze_bn_at: Share of the steps after which BN uses its running statistics and no longer changes them.
        freeze_ranges_at: Share of the steps after which the quantizers' parameters no longer change.
        scale_lr: Learning rate of the quantizers' parameters, as a factor of `lr`.
        damping: Largest weight of what pulls latent weights to the centres of their bins (arXiv 2203.11086); it rises
            from 0 over all steps as half a cosine.
        progressive_bits: Descending bit widths, an equal share of the steps each, below which no quantizer is; the last
            must not be above the smallest bit width that is asked for.
        sync_bn: In several processes, BN normalizes with the statistics of the whole batch instead of each process's
            share (SyncBatchNorm); needs CUDA.
    """

    lr: Annotated[float, Range(gt=0)] = 0.01
    bn_images: Annotated[int, Range(ge=0)] = 0
    freeze_bn_at: Annotated[float, Range(ge=0, le=1)] = 1.0
    freeze_ranges_at: Annotated[float, Range(ge=0, le=1)] = 1.0
    scale_lr: Annotated[float, Range(ge=0)] = 1.0
    damping: Annotated[float, Range(ge=0)] = 0.0
    progressive_bits: tuple[Bits, ...] = ()
    sync_bn: bool = False


@dataclass(frozen=True)
class Override:
    """Bit widths of the layers whose name matches a pattern; None leaves a bit width as it is.

    Attributes:
        weights: Bits of the layer's weights.
        activations: Bits of what the layer reads.
    """

    __pydantic_config__: ClassVar[Any] = STRICT
    weights: Bits | None = None
    activations: Bits | None = None


@dataclass(frozen=True)
class QuantizationConfig:
    """Bit widths, and how a quantizer learns its Grid.

    Attributes:
        weight_method: How weights learn their Grid; docs/methods.md has each method. "lsq" learns each step (arXiv
            1902.08153), "lsq+" as well, from a start of its own (2004.09576), "dorefa" squeezes weights by tanh
            (1606.06160), "minmax" keeps the range that calibration found, "package.module:Class" is your own; see
            docs/adding_a_method.md.
        activation_method: Likewise of activations: "lsq"; "lsq+" learns an offset, too; "pact" the clipping level
            (1805.06085); "dorefa" and "minmax" keep the range that calibration found; or your own, likewise.
        weights: Bits of the weights.
        activations: Bits of the activations.
        first_layer: Bits of the network's input and of the first layer's weights.
        last_layer: Bits of the last layer's input and weights.
        overrides: Bit widths by layer, before all of the above: a layer's name such as "layer1.0.conv1", or a pattern
            with `*`, `?` and `[...]`. The longest pattern counts; see `crqat.train.placement.overrides`.
        float_layers: Convolutions and linear layers that carry no quantizers, on their input neither, by name or
            pattern as in `overrides`. A list is for all targets; a mapping gives one for each target by name. One
            placement serves all files, so a layer that is named for any target of the recipe is float in training and
            in every file.
        calibration: Where ranges start: "mse" at the smallest mean squared rounding error, "minmax" at the largest
            value seen, "percentile" where 99.99 % of an activation's values that are not 0 fit, weights as "minmax".
        calibration_images: Training images from which the ranges start.
    """

    __pydantic_config__: ClassVar[Any] = STRICT
    weight_method: Annotated[str, OneOf(("lsq", "lsq+", "dorefa", "minmax"))] = "lsq"
    activation_method: Annotated[str, OneOf(("lsq", "lsq+", "pact", "dorefa", "minmax"))] = "lsq"
    weights: Bits = 8
    activations: Bits = 8
    first_layer: Bits = 8
    last_layer: Bits = 8
    overrides: dict[str, Override] = field(default_factory=dict)
    float_layers: Annotated[dict[str, tuple[str, ...]], ByTarget()] = field(default_factory=dict)
    calibration: Literal["mse", "minmax", "percentile"] = "mse"
    calibration_images: Annotated[int, Range(ge=1)] = 512


@dataclass(frozen=True)
class PTQConfig:
    """What is done behind calibration, before any training; none of it needs labels.

    Attributes:
        bias_correction: Move the mean of each output channel back to where the float network has it (arXiv 1906.04721,
            4.2), by the bias or by the BatchNorm behind the layer.
        equalization: Bring the ranges of channels between two layers into line where that changes nothing of what the
            float network computes (cross-layer equalization, 1906.04721, 4.1): with nothing but a ReLU between them.
        adaround: Round weights so that each layer's outputs come closest to the float network's (AdaRound's problem,
            2004.10568), instead of each weight to the nearest code.
    """

    __pydantic_config__: ClassVar[Any] = STRICT
    bias_correction: bool = False
    equalization: bool = False
    adaround: bool = False


@dataclass(frozen=True)
class TrainConfig:
    """Everything the `train` stage depends on; `pipeline.recipe.recipe` puts it together from a recipe's sections.

    Attributes:
        seed: Of the split, the initial weights, the order of images and the augmentation.
        targets: The runtimes that the network must run on; they constrain where quantizers sit and their bit widths.
        data: The images.
        model: The float network.
        float_training: How the float network is trained if it has no weights; the recipe's `float` section.
        quantization: Bit widths and methods.
        qat: How the quantized network is trained.
        consistency: The consistency term.
        ptq: What is done behind calibration.
        device: "auto" takes CUDA where there is one.
        compile: "auto" fuses the training step by torch.compile where a C++ compiler is at hand.
    """

    __pydantic_config__: ClassVar[Any] = STRICT
    seed: int
    targets: tuple[Target, ...]
    data: DataConfig
    model: ModelConfig
    float_training: FloatConfig
    quantization: QuantizationConfig
    qat: QATConfig
    consistency: ConsistencyConfig = field(default_factory=ConsistencyConfig)
    ptq: PTQConfig = field(default_factory=PTQConfig)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    compile: Literal["auto", "never"] = "auto"
