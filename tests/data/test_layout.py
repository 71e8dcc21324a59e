"""Data sets without class folders are recognized by names and structure, and classes are not mistaken for them."""

import os

from workflow.data.folder import list_images
from workflow.errors import WorkflowError

import pytest


def create(folder, files: str):
    """Create small files in a folder, given their paths; {a,b} stands for both."""
    for pattern in files.split():
        head, _, rest = pattern.partition("{")
        names, _, tail = rest.partition("}")
        if rest:
            create(folder, " ".join(f"{head}{name}{tail}" for name in names.split(",")))
        else:
            path = folder / pattern.replace("+", " ")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(os.fsencode(pattern))


@pytest.mark.refused("folder: a split, folds, or images beside labels, at one level or two")
@pytest.mark.parametrize(
    ("files", "named"),
    [
        ("{train,valid,test}/1.jpg", "train"),
        ("{training_set,test_set}/1.jpg", "training_set"),
        ("{Train,Val}/{cat,dog}/1.jpg", "Train"),
        ("{train2017,val2017}/1.jpg annotations/a.json", "train2017"),
        ("{TrainImages,testimages}/1.jpg", "TrainImages"),
        ("{seg_train,seg_test,seg_pred}/1.jpg", "seg_train"),
        ("{trainA,trainB,testA,testB}/1.jpg", "trainA"),
        ("{cats_train,cats_test,dogs_train,dogs_test}/1.jpg", "cats_train"),
        ("{trainingsset,testset}/1.jpg", "trainingsset"),
        ("{entraînement,validation}/1.jpg", "validation"),
        ("{训练集,测试集}/1.jpg", "训练集"),
        ("{train,test}/1.jpg other/1.jpg", "train"),
        ("{cat,dog}/1.jpg test/{cat,dog}/1.jpg", "test"),
        ("{cat,dog}/1.jpg augmented/{cat,dog}/1.jpg", "augmented"),
        ("color/{a,b,c,d,e}/1.jpg gray/{a,b,c,d,e}/1.jpg", "gray"),
        ("plants/color/{a,b,c,d,e}/1.jpg plants/gray/{a,b,c,d,e,f}/1.jpg", "gray"),
        ("{jpg,segmim}/1.jpg", "segmim"),
        ("{fold1,fold2}/1.jpg", "fold1"),
        ("{fold_a,fold_b}/{cat,dog}/1.jpg", "fold_a"),
        ("{part1,part2}/{cat,dog}/1.jpg", "part1"),
        ("images/1.jpg labels/1.txt", "labels"),
        ("images/1.png masks/1.png", "masks"),
        ("JPEGImages/1.jpg Annotations/1.xml ImageSets/Main/train.txt", "Annotations"),
        ("train2017/1.jpg annotations/a.json", "annotations"),
        ("{train,valid}/images/1.jpg {train,valid}/labels/1.txt", "train"),
        ("images/{train,val}/1.jpg labels/{train,val}/1.txt", "labels"),
        ("archive/{train,test}/{cat,dog}/1.jpg", "train"),
        ("archive/{train,test}/1.jpg", "train"),
        ("archive/{train,test}/{cat,dog}/1.jpg docs/1.jpg", "train"),
        ("{cat,dog}/images/1.png {cat,dog}/masks/1.png", "masks"),
    ],
)
def test_other_layout_is_refused(tmp_path, files, named):
    create(tmp_path / "mine", files)
    with pytest.raises(WorkflowError, match=f"(already split|labels or masks).*{named}.*folder"):
        list_images(tmp_path / "mine")


@pytest.mark.survived("folder: classes whose names are those of splits")
@pytest.mark.parametrize(
    "files",
    [
        "{train,car,bus}/1.jpg",
        "{valid,expired,forged}/1.jpg",
        "{test,control}/1.jpg",
        "{test1,cat,dog,test2}/1.jpg",
        "{test+tubes,pipettes}/1.jpg",
        "{train+tracks,test+tubes}/1.jpg",
        "{valid,invalid}/1.jpg",
        "{valid_test,invalid_test}/1.jpg",
        "{test1,test2}/1.jpg",
        "{part1,part2}/1.jpg",
        "{mask,no_mask}/1.jpg",
        "{with_mask,without_mask}/1.jpg",
        "{masks,pictures,statues}/1.jpg",
        "{apples,oranges}/{front,back}/1.jpg",
        "{apples,oranges}/{train,test}/1.jpg",
        "apples/{front,back,left,right}/1.jpg oranges/{front,back,left,right}/1.jpg",
        "apples/oranges/1.jpg {oranges,pears}/1.jpg",
        "{0,1,2}/1.jpg",
        "{labels,boxes}/1.jpg",
        "{dev,val}/1.jpg",
        "{apple+images,orange+images}/1.jpg",
    ],
)
def test_classes_are_not_mistaken_for_a_layout(tmp_path, files):
    create(tmp_path / "mine", files)
    assert all(list_images(tmp_path / "mine").values())


@pytest.mark.refused("folder: a test set without class folders beside classes")
@pytest.mark.parametrize("name", ["test", "Test", "test_set", "testing", "Test+Images", "тест", "holdout", "unlabeled"])
def test_test_set_beside_classes_is_refused(tmp_path, name):
    create(tmp_path / "mine", f"{{cat,dog}}/1.jpg {name}/1.jpg")
    with pytest.raises(WorkflowError, match=f"mine holds.*{name.replace('+', ' ')}.*rename"):
        list_images(tmp_path / "mine")


def test_folder_above_the_classes_is_refused_with_a_hint(tmp_path):
    create(tmp_path / "mine", "archive/{cat,dog}/1.jpg")
    with pytest.raises(WorkflowError, match=r"mine/archive .*--source"):
        list_images(tmp_path / "mine")
    assert list(list_images(tmp_path / "mine/archive")) == ["cat", "dog"]
