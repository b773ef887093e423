"""Small data sets in the layout and format in which the large ones are published.

Folder and file names, archives and formats are the real ones; the images are single colours that
tell label and domain, so that a test can see that neither was mixed up. Each function writes what
would be downloaded into a directory, under its published name, and returns how many examples of
each split there are.
"""

import io
import json
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import scipy.io
from PIL import Image

from fedlora_jax.data.builders.nico_pp import CLASSES, CONTEXTS

DOMAINS = ("clipart", "infograph", "painting", "quickdraw", "real", "sketch")


def colour(label: int, domain: int = 0) -> tuple[int, int, int]:
    """Tells any two of 345 labels and six domains apart, also after JPEG."""
    return (label % 16) * 16 + 8, (label // 16) * 11 + 4, domain * 40 + 20


def picture(label, domain=0, size=(40, 30), form="jpeg"):
    """The bytes of an image file."""
    file = io.BytesIO()
    Image.new("RGB", size, colour(label, domain)).save(file, form, **{"quality": 95})
    return file.getvalue()


def size_of(number):
    """Sizes differ, as those of photographs do."""
    return 36 + 7 * (number % 3), 30 + 5 * (number % 4)


def tar(path, files):
    """A compressed archive of these contents by name."""
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def _lines(values):
    return "".join(f"{value}\n" for value in values).encode()


def _binary(labels, number_of_labels):
    """Records of CIFAR: label bytes, then 1024 red, 1024 green, 1024 blue."""
    records = []
    for label in labels:
        planes = np.repeat(np.array(colour(label), np.uint8), 1024)
        coarse = [label // 5] if number_of_labels == 2 else []
        records.append(bytes([*coarse, label]) + planes.tobytes())
    return b"".join(records)


def write_cifar10(directory):
    names = "airplane automobile bird cat deer dog frog horse ship truck".split()
    root = "cifar-10-batches-bin"
    files = {f"{root}/data_batch_{i}.bin": _binary([i, i + 1], 1) for i in range(1, 6)}
    files[f"{root}/test_batch.bin"] = _binary(range(4), 1)
    files[f"{root}/batches.meta.txt"] = _lines([*names, ""])
    tar(directory / "cifar-10-binary.tar.gz", files)
    return {"train": 10, "test": 4}


def write_cifar100(directory):
    root = "cifar-100-binary"
    files = {
        f"{root}/train.bin": _binary(range(0, 100, 7), 2),
        f"{root}/test.bin": _binary(range(0, 100, 20), 2),
        f"{root}/coarse_label_names.txt": _lines(f"coarse_{i}" for i in range(20)),
        f"{root}/fine_label_names.txt": _lines(f"fine_{i}" for i in range(100)),
    }
    tar(directory / "cifar-100-binary.tar.gz", files)
    return {"train": 15, "test": 5}


def write_domainnet(directory):
    classes = {0: "aircraft_carrier", 1: "airplane", 100: "dumbbell", 344: "zigzag"}
    for domain, name in enumerate(DOMAINS):
        lists = {"train": [], "test": []}
        with zipfile.ZipFile(directory / f"{name}.zip", "w") as archive:
            for number, (label, folder) in enumerate(classes.items()):
                for i, split in enumerate(("train", "train", "test")):
                    path = f"{name}/{folder}/{name}_{label + 1:03}_{i + 1:06}.jpg"
                    archive.writestr(path, picture(label, domain, size_of(number + i)))
                    lists[split].append(f"{path} {label}")
        for split, lines in lists.items():
            (directory / f"{name}_{split}.txt").write_bytes(_lines(lines))
    return {"train": 8, "test": 4}


def write_food101(directory):
    labels = {0: "apple_pie", 1: "baby_back_ribs", 100: "waffles"}
    files, lists = {}, {"train": {}, "test": {}}
    for label, name in labels.items():
        for i, split in enumerate(("train", "train", "test")):
            image = f"{name}/{1000000 + i}"
            files[f"food-101/images/{image}.jpg"] = picture(label, size=size_of(i))
            lists[split].setdefault(name, []).append(image)
    for split, names in lists.items():
        files[f"food-101/meta/{split}.json"] = json.dumps(names).encode()
    tar(directory / "food-101.tar.gz", files)
    return {"train": 6, "validation": 3}


def write_oxford_flowers102(directory):
    labels = np.array([1, 102, 50, 1, 102, 50, 1, 102], np.uint8)  # from 1
    files = {
        f"jpg/image_{i:05}.jpg": picture(int(label) - 1, size=size_of(i))
        for i, label in enumerate(labels, start=1)
    }
    tar(directory / "102flowers.tgz", files)
    scipy.io.savemat(directory / "imagelabels.mat", {"labels": labels[None]})
    ids = {"trnid": [[1, 2, 3]], "valid": [[4, 5]], "tstid": [[6, 7, 8]]}
    scipy.io.savemat(
        directory / "setid.mat", {key: np.array(x, np.uint16) for key, x in ids.items()}
    )
    return {"train": 3, "validation": 2, "test": 3}


def write_oxford_iiit_pet(directory):
    xml = """<annotation><folder>OXIIIT</folder><filename>{0}.jpg</filename>
<size><width>40</width><height>30</height><depth>3</depth></size>
<object><name>cat</name><bndbox><xmin>4</xmin><ymin>3</ymin><xmax>20</xmax><ymax>15</ymax></bndbox>
</object></annotation>"""
    pets = {"Abyssinian": (1, 1), "american_bulldog": (2, 2), "yorkshire_terrier": (37, 2)}
    images, annotations, lists = {}, {}, {"trainval": [], "test": []}
    for name, (label, species) in pets.items():
        for i, split in enumerate(("trainval", "trainval", "test"), start=1):
            image = f"{name}_{i}"
            images[f"images/{image}.jpg"] = picture(label - 1)
            trimap = io.BytesIO()
            Image.new("L", (40, 30), 2).save(trimap, "png")
            annotations[f"annotations/trimaps/{image}.png"] = trimap.getvalue()
            if split == "trainval":  # test images have none
                annotations[f"annotations/xmls/{image}.xml"] = xml.format(image).encode()
            lists[split].append(f"{image} {label} {species} {i}")
    for split, lines in lists.items():
        annotations[f"annotations/{split}.txt"] = _lines(lines)
    tar(directory / "images.tar.gz", images)
    tar(directory / "annotations.tar.gz", annotations)
    return {"train": 6, "test": 3}


def write_cars196(directory):
    fields = ["bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2", "class", "fname"]

    def annotations(labels):
        rows = [(2, 3, 30, 20, label, f"{i:05}.jpg") for i, label in enumerate(labels, start=1)]
        found = np.empty((1, len(rows)), [(field, object) for field in fields])
        for i, row in enumerate(rows):
            found[0, i] = tuple(np.array([[x]]) if isinstance(x, int) else x for x in row)
        file = io.BytesIO()
        scipy.io.savemat(file, {"annotations": found})
        return file.getvalue()

    labels = {"train": [1, 196, 100, 1], "test": [196, 1]}  # from 1
    for split, each in labels.items():
        files = {
            f"cars_{split}/{i:05}.jpg": picture(label - 1, size=size_of(i))
            for i, label in enumerate(each, start=1)
        }
        tar(directory / f"cars_{split}.tgz", files)
    tar(
        directory / "car_devkit.tgz",
        {"devkit/cars_train_annos.mat": annotations(labels["train"])},
    )
    (directory / "cars_test_annos_withlabels.mat").write_bytes(annotations(labels["test"]))
    return {"train": 4, "test": 2}


def write_fgvc_aircraft(directory):
    root = "fgvc-aircraft-2013b/data"
    variants = ["707-320", "727-200", *(f"A{i:03}" for i in range(97)), "Yak-42"]
    files = {f"{root}/variants.txt": _lines(variants)}
    counts, number = {"train": 4, "val": 3, "test": 2}, 34309
    for split, count in counts.items():
        lines = []
        for i in range(count):
            label = (0, 99, 1, 50)[i]
            files[f"{root}/images/{number:07}.jpg"] = picture(label, size=size_of(number))
            lines.append(f"{number:07} {variants[label]}")
            number += 1
        files[f"{root}/images_variant_{split}.txt"] = _lines(lines)
    tar(directory / "fgvc-aircraft-2013b.tar.gz", files)
    return {"train": 4, "validation": 3, "test": 2}


def write_nico_pp(directory, each=6):
    """Unpacked, as it is fetched by hand."""
    count = 0
    for domain, context in enumerate(CONTEXTS):
        for label in (0, 18, 59):  # airplane, fishing rod, wolf
            folder = Path(directory) / "public_dg_0416/train" / context / CLASSES[label]
            folder.mkdir(parents=True)
            for i in range(each):
                size = (30 + label % 7 + i, 24 + domain + i // 2)
                (folder / f"{context}_{i:06}.jpg").write_bytes(picture(label, domain, size))
                count += 1
    return {"train+test": count}


WRITERS = {
    name.removeprefix("write_"): value
    for name, value in list(globals().items())
    if name.startswith("write_")
}
