"""Every path that two files share, relative to the repository's root, where DVC runs each stage."""

from pathlib import Path

PARAMS = Path("params.yaml")

INBOX = Path("data/inbox")
RAW = Path("data/raw.zip")
ORIGIN = Path("data/raw.json")

IMAGES = Path("data/images.npy")
INDEX = Path("data/index.csv")
REJECTED = Path("data/rejected.csv")
SPLIT = Path("data/split.csv")
TRAINING_BATCH = Path("data/training_batch.npy")
PREDICTIONS = Path("data/predictions.csv")

MODEL = Path("models/model.safetensors")
SNAPSHOTS = Path("models/snapshots")
ONNX = Path("models/model.onnx")
INT8 = Path("models/model.int8.onnx")

DATA_METRICS = Path("metrics/data.json")
ENVIRONMENT = Path("metrics/environment.json")
TRAIN_LOG = Path("metrics/train")
EVALUATION = Path("metrics/evaluation.json")
TEST_METRICS = Path("metrics/test.json")
CLASS_METRICS = Path("metrics/classes.csv")

PLOTS = Path("plots")
REPORT = Path("plots/report.html")
