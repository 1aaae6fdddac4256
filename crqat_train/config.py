"""Configuration of the `train` stage. Imports nothing heavy, so that a recipe is checked in an instant."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

from crqat.core.field_bounds import STRICT, OneOf, Range
from crqat.core.targets import ByTarget, TargetName

Bits = Annotated[int, Range(ge=2, le=8)]
Target = Annotated[str, TargetName()]
# Resize and crop of stored images where the recipe sets neither: those of the usual ImageNet evaluation.
FOLDER_SIZE, FOLDER_CROP = 256, 224
# A larger mean or standard deviation was probably given in units of 0..255 instead of 0..1.
LARGEST_UNIT = 2.0
Interpolation = Literal["bilinear", "bicubic", "lanczos", "nearest"]
FILE_SOURCES = ("imagefolder", "imagelist", "webdataset", "huggingface")
# Sources whose images are RGB unless `data.channels` says otherwise.
COLOUR_SOURCES = (*FILE_SOURCES, "cifar10", "cifar100")


def source_kind(source: str | None) -> str | None:
    """Return the kind of a data source: "huggingface" for "huggingface:NAME", any other source unchanged."""
    return "huggingface" if source is not None and source.startswith("huggingface:") else source


def is_onnx_file(model_name: str) -> bool:
    """Whether `model.name` is the path of an ONNX file, which brings the network and its weights."""
    return model_name.lower().endswith(".onnx")


@dataclass(frozen=True)
class DataConfig:
    """Source and augmentation of the images.

    Attributes:
        source: "digits", "cifar10", "cifar100", "imagefolder", "imagelist", "webdataset", "huggingface",
            "huggingface:NAME", or "package.module:function" that returns a `crqat.train.data.dataset.Dataset`.
        root: Folder of an on-disk source. For "imagefolder" it holds train/CLASS/* and test/CLASS/* (or val/), for
            "webdataset" train-*.tar and test-*.tar; for "huggingface" it is a folder written by `save_to_disk`.
        image_list: For "imagelist", the JSON file that names the images and their classes; see
            `crqat.train.data.imagelist.ImageList`. Paths in it are relative to `root`.
        download: Download the data set into `root` if it is missing.
        unlabeled: A second source of the same kinds. Its training images are used without their labels, by the
            consistency term alone.
        unlabeled_root: Folder of the `unlabeled` source; None takes `root`. For "imagefolder" it may be any folder: all
            images in it and in its subfolders are used, whether or not they are sorted into classes.
        unlabeled_ratio: Unlabeled images for each labeled one in a training step; 0 leaves them out.
        labeled: Number of training images that keep their labels, balanced over the classes and drawn with the recipe's
            seed; the validation images are among them. All others are unlabeled. None keeps all labels.
        judging: Share of the training images reserved for `crqat advise`, drawn with the recipe's seed; None reserves
            none.
        validation: Share of the training images held out to select the checkpoint, drawn with the recipe's seed.
        crop_padding: Pixels of padding on each side before a random crop; 0 switches the crop off.
        flip: Apply a random horizontal flip.
        strong: "randaugment" gives the student a strongly augmented view of every image in QAT
            (`train.data.augment.strong_view`) and the teacher a weakly augmented one; "none" gives both weakly
            augmented views.
        size: Stored images (FILE_SOURCES) are resized so that the shorter side has this many pixels; None is 256.
        crop: Side of the square that is cut out of the centre of stored images, in pixels; None is 224.
        channels: Channels of stored images and CIFAR: 3 is RGB, 1 is grey; None is 3.
        interpolation: Interpolation with which stored images are resized; None is "bilinear". With `model.weights:
            pretrained`, each of size, crop, interpolation, mean and std that is None takes the value published with
            these weights.
        convert: Convert stored images of another mode (grey, palette, CMYK; colour where `channels` is 1) to RGB or
            grey instead of refusing them.
        image_column: Image column of a "huggingface" data set; None takes the only column of images.
        label_column: Label column of a "huggingface" data set; None takes the only column of class labels, or the one
            called "label".
        mean: Mean of each channel, in units of 0..1; None takes the source's default.
        std: Standard deviation of each channel, in units of 0..1; None takes the source's default.
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
    judging: Annotated[float, Range(gt=0, lt=1)] | None = None
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
    std: tuple[Annotated[float, Range(gt=0)], ...] | None = None


@dataclass(frozen=True)
class ModelConfig:
    """Architecture and weights of the float network.

    Attributes:
        name: "cifar/resnet20" or another of that family, "torchvision/NAME", "timm/NAME", the path of a float ONNX
            file, which brings its weights, or "package.module:function". The function or class is called with the
            number of classes if it has a parameter `classes` or `num_classes`, and with the number of image channels if
            it has a parameter `channels`, `in_channels` or `in_chans`.
        weights: A checkpoint: .safetensors, .pth, .pt, .th, .ckpt, .bin or .pth.tar; it is fine-tuned only with
            `float.fine_tune`. "pretrained" takes the weights that torchvision or timm publish; a `float` section always
            fine-tunes them. None trains the float network by the `float` section, or takes the weights of an ONNX file.
        nncf: A folder written by `crqat nncf import`: float weights and ranges of a network quantized by NNCF. It
            replaces `weights` and calibration.
        weights_key: Key of the state dict inside `weights`, such as "state_dict_ema"; None takes the only one that
            fits.
        accuracy: Known top-1 accuracy of the float network on the test images, such as 0.9173. The gate fails if the
            whole confidence interval of the measured accuracy is more than `gate.max_accuracy_drop` below this value.
            Nothing else depends on the value.
    """

    __pydantic_config__: ClassVar[Any] = STRICT
    name: str
    weights: str | None = None
    nncf: str | None = None
    weights_key: str | None = None
    accuracy: Annotated[float, Range(gt=0, le=1)] | None = None

    @property
    def has_weights(self) -> bool:
        """Whether a file brings the float network's weights, so that none are initialized at random or downloaded."""
        return self.weights not in (None, "pretrained") or self.nncf is not None or is_onnx_file(self.name)


@dataclass(frozen=True)
class OptimizerConfig:
    """One training run by SGD with Nesterov momentum 0.9.

    The learning rate warms up linearly over 5 % of the steps and then decays to zero as a cosine.

    Attributes:
        epochs: Passes over the training images.
        batch_size: Images in a step, over all processes together.
        lr: Peak learning rate.
        weight_decay: Weight decay of convolution and linear weights; biases, BN and quantizer scales have none.
        precision: Type of convolutions and linear layers in training, by autocast. Weights, quantizers, evaluation and
            exported files are float32.
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
        teacher: "ema" is the moving average of the student; "float" is the frozen float network; "none" trains without
            a teacher (plain QAT). "pseudo-label" has no teacher in the loop: the float network labels the unlabeled
            images once, without augmentation, and the term is the cross-entropy with these labels.
        weight: lambda_max, the largest weight of the term. With 0 and the "ema" teacher, the student is trained by
            plain QAT, and the teacher is the average of its weights.
        ramp_up: Share of the steps over which lambda rises to `weight` as exp(-5 (1 - t/T)^2) in step t of these T
            steps.
        temperature: Softmax temperature of student and teacher; the term is multiplied by its square.
        ema_decay: Largest alpha of theta' = alpha theta' + (1 - alpha) theta, with the teacher's weights theta' and the
            student's weights theta; step t uses min(1 - 1/(t+1), `ema_decay`).
    """

    __pydantic_config__: ClassVar[Any] = STRICT
    teacher: Literal["ema", "float", "pseudo-label", "none"] = "ema"
    weight: Annotated[float, Range(ge=0)] = 1.0
    ramp_up: Annotated[float, Range(ge=0, le=1)] = 0.3
    temperature: Annotated[float, Range(gt=0)] = 1.0
    ema_decay: Annotated[float, Range(ge=0, lt=1)] = 0.99


@dataclass(frozen=True)
class FloatConfig(OptimizerConfig):
    """Training of the float network.

    Attributes:
        fine_tune: Fine-tune the weights of a file, which `model.weights` names or an ONNX file holds; without it they
            stay unchanged. Published weights ("pretrained") are always fine-tuned.
        strong: Like `data.strong`, for the training of the float network.
        consistency: The consistency term for the training of the float network. The teacher is the moving average of
            the float network, and unlabeled images are used if there are any. The better one of network and teacher on
            the validation images is kept. None trains without the term.
    """

    fine_tune: bool = False
    strong: Literal["none", "randaugment"] = "none"
    consistency: ConsistencyConfig | None = None


@dataclass(frozen=True)
class QATConfig(OptimizerConfig):
    """Training of the quantized network.

    It starts from trained weights, so its default learning rate is smaller than that of the float network.

    Attributes:
        epochs: Passes over the training images; 0 is post-training quantization.
        lr: Peak learning rate.
        bn_images: Training images from which BN statistics are re-estimated after training, with the quantizers on
            (arXiv 2203.11086 needs it for depthwise layers of few bits); 0 keeps the statistics of training.
        freeze_bn_at: Share of the steps after which BN uses its running statistics and no longer updates them.
        freeze_ranges_at: Share of the steps after which the quantizers' parameters no longer change.
        scale_lr: Learning rate of the quantizers' parameters, as a factor of `lr`.
        damping: Largest weight of the dampening loss, which pulls latent weights to the centres of their bins (arXiv
            2203.11086); it rises from 0 over all steps as half a cosine.
        progressive_bits: Descending lower bounds on the bit width of all quantizers. Each holds for an equal share of
            the steps; the last must not be larger than the smallest bit width in the recipe.
        sync_bn: With several processes, BN normalizes with the statistics of the whole batch instead of each process's
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
    """Bit widths for layers whose name matches a pattern; None leaves a bit width unchanged.

    Attributes:
        weights: Bit width of the layer's weights.
        activations: Bit width of the layer's inputs.
    """

    __pydantic_config__: ClassVar[Any] = STRICT
    weights: Bits | None = None
    activations: Bits | None = None


@dataclass(frozen=True)
class QuantizationConfig:
    """Bit widths and quantization methods. A Grid is a quantizer's scale, zero point and integer range.

    Attributes:
        weight_method: How weights learn their Grid; docs/methods.md describes each method. "lsq" learns each scale
            (arXiv 1902.08153); "lsq+" does so from other initial scales (2004.09576); "dorefa" squeezes weights by tanh
            (1606.06160); "minmax" keeps the calibrated range; "package.module:Class" is your own method, see
            docs/adding_a_method.md.
        activation_method: How activations learn their Grid: "lsq" learns the scale; "lsq+" an offset, too; "pact" the
            clipping level (1805.06085); "dorefa" and "minmax" keep the calibrated range; "package.module:Class" is your
            own method.
        weights: Bit width of the weights.
        activations: Bit width of the activations.
        first_layer: Bit width of the network's input and of the first layer's weights.
        last_layer: Bit width of the last layer's input and weights.
        overrides: Bit widths by layer; they take precedence over all of the above. A key is a layer's name such as
            "layer1.0.conv1", or a pattern with `*`, `?` and `[...]`. The longest matching pattern counts; see
            `crqat.train.placement.overrides`.
        float_layers: Convolutions and linear layers that stay in float, without quantizers on weights or input, by name
            or pattern as in `overrides`. A list is for all targets; a mapping has one list for each target, by the
            target's name. The files of all targets share one placement of quantizers, so a layer that is listed for any
            target of the recipe is float in training and in every file.
        calibration: How initial ranges are chosen: "mse" has the smallest mean squared rounding error, "minmax" reaches
            to the largest value seen, "percentile" covers 99.99 % of an activation's nonzero values. For weights,
            "percentile" is the same as "minmax".
        calibration_images: Number of training images for calibration.
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
    """Post-training steps between calibration and training; none of them needs labels.

    Attributes:
        bias_correction: Correct the mean of each output channel to that of the float network (arXiv 1906.04721, 4.2),
            in the bias or in the BatchNorm after the layer.
        equalization: Equalize the channel ranges of consecutive layers where that leaves the float network's function
            unchanged (cross-layer equalization, 1906.04721, 4.1): where at most a ReLU lies between them.
        adaround: Choose the rounding of weights so that each layer's outputs come closest to the float network's
            (AdaRound's problem, 2004.10568), instead of rounding each weight to the nearest code.
    """

    __pydantic_config__: ClassVar[Any] = STRICT
    bias_correction: bool = False
    equalization: bool = False
    adaround: bool = False


@dataclass(frozen=True)
class TrainConfig:
    """Everything that the `train` stage depends on; `pipeline.recipe.recipe` assembles it from a recipe's sections.

    Attributes:
        seed: Seed of the split, the initial weights, the order of images and the augmentation.
        targets: The runtimes that the network must run on; they determine where quantizers sit and which bit widths are
            allowed.
        data: Source and augmentation of the images.
        model: Architecture and weights of the float network.
        float_training: How the float network is trained if no file brings its weights; the recipe's `float` section.
        quantization: Bit widths and quantization methods.
        qat: How the quantized network is trained.
        consistency: Teacher, weight and schedule of the loss term that draws predictions towards a teacher's.
        ptq: Post-training steps between calibration and training.
        device: Device of the training; "auto" takes CUDA if it is available.
        compile: "auto" compiles the training step by torch.compile if a C++ compiler is available.
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
