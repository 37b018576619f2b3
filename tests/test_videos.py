"""Clips from every source become the same frames; damaged and hostile ones are refused in time."""

from __future__ import annotations

import base64
import io
import re
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import GifImagePlugin, Image

from tokenflex import videos
from tokenflex.images import load_image
from tokenflex.videos import FrameSampling, frame_sizes, load_video

SIZE = (24, 16)  # width, height


def frame(number: int, size: tuple[int, int] = SIZE) -> Image.Image:
    """A picture whose gray level is its number, which GIF keeps exactly."""
    return Image.new("RGB", size, (10 * number, 10 * number, 10 * number))


def levels(frames) -> list[int]:
    return [round(np.asarray(picture)[0, 0, 0] / 10) for picture in frames]


def animation(number: int, kind: str = "GIF", duration=100) -> bytes:
    file = io.BytesIO()
    frames = [frame(i) for i in range(number)]
    lossless = {"lossless": True} if kind == "WEBP" else {}
    frames[0].save(
        file,
        kind,
        save_all=True,
        append_images=frames[1:],
        duration=duration,
        **lossless,
    )
    return file.getvalue()


@pytest.fixture
def folder(tmp_path) -> Path:
    path = tmp_path / "clip"
    path.mkdir()
    for i in range(12):
        frame(i).save(path / f"{i}.png")
    (path / "notes.txt").write_text("not a frame")
    (path / ".hidden.png").write_text("not a frame")
    return path


@pytest.mark.parametrize("kind", ["GIF", "WEBP"])
def test_a_clip_is_the_same_from_every_source(tmp_path, folder, kind):
    content = animation(12, kind)
    path = tmp_path / "clip.bin"  # the content decides, not the name
    path.write_bytes(content)
    frames = [frame(i) for i in range(12)]
    array = np.stack([np.asarray(picture) for picture in frames])
    sampling = FrameSampling(max_frames=5)
    sources = [path, str(path), content, io.BytesIO(content), folder, str(folder), frames, array]
    sources += [torch.from_numpy(array), torch.from_numpy(array).permute(0, 3, 1, 2)]
    sources.insert(0, base64.b64encode(content).decode())
    timed = []
    for source in sources:
        clip = load_video(source, sampling=sampling)
        assert levels(clip.frames) == [0, 3, 6, 8, 11]  # evenly, both ends; 10 after 9 in a folder
        assert {picture.mode for picture in clip.frames} == {"RGB"}
        assert frame_sizes(source, sampling=sampling) == [SIZE[::-1]] * 5
        if clip.times is not None:
            assert clip.times == pytest.approx([0, 0.3, 0.6, 0.8, 1.1])
        timed.append(clip.times is not None)
    assert timed == [True] * 5 + [False] * 6


def test_frames_per_second_follow_the_durations_of_a_gif():
    # Frames start at 0, 1, 1.1, 1.2, 3.2 seconds.
    content = animation(5, duration=[1000, 100, 100, 2000, 500])
    clip = load_video(content, sampling=FrameSampling(fps=1))
    assert levels(clip.frames) == [0, 1, 3]  # shown at 0, 1 and 2 (and 3)
    assert clip.times == pytest.approx([0, 1, 1.2])
    assert levels(load_video(content, sampling=FrameSampling(fps=100)).frames) == [0, 1, 2, 3, 4]
    assert levels(load_video(content, sampling=FrameSampling(fps=0.001)).frames) == [0]
    thinned = load_video(content, sampling=FrameSampling(max_frames=2, fps=1))
    assert levels(thinned.frames) == [0, 3]


def test_a_frame_without_a_delay_does_not_take_that_of_the_one_before():
    content = animation(3, duration=[1000, 400, 300])
    controls = [match.start() for match in re.finditer(rb"!\xf9\x04", content)]
    assert len(controls) == 3
    content = content[: controls[1]] + content[controls[1] + 8 :]  # the second frame's alone
    times = load_video(content).times
    assert times == pytest.approx([0, 1, 1.1])


@pytest.mark.parametrize("rate", [10, 24, 29.97, 30])
def test_frames_per_second_of_a_steady_clip_are_steady(rate):
    ends = [(i + 1) / rate for i in range(300)]
    chosen = FrameSampling(max_frames=1000, fps=rate / 3).choose(300, ends)
    assert chosen == [*range(0, 300, 3)]


def test_transparent_frames_lie_over_white_and_are_turned_upright():
    clear = [Image.new("RGBA", SIZE, (0, 0, 0, 0)) for _ in range(2)]
    for picture, colour in zip(clear, ((200, 0, 0, 255), (0, 0, 200, 255)), strict=True):
        picture.paste(colour, (0, 0, 4, 4))
    file = io.BytesIO()
    clear[0].save(file, "GIF", save_all=True, append_images=clear[1:], disposal=2)
    shown = load_video(file.getvalue()).frames
    assert [picture.getpixel((9, 9)) for picture in shown] == [(255, 255, 255)] * 2
    assert [picture.getpixel((0, 0)) for picture in shown] == [(200, 0, 0), (0, 0, 200)]

    exif = Image.Exif()
    exif[0x0112] = 6
    opaque = [picture.convert("RGB") for picture in clear]
    options = {"lossless": True, "exif": exif}
    file = io.BytesIO()
    opaque[0].save(file, "WEBP", save_all=True, append_images=opaque[1:], **options)
    shown = load_video(file.getvalue()).frames
    assert [picture.size for picture in shown] == [SIZE[::-1]] * 2
    assert frame_sizes(file.getvalue()) == [SIZE] * 2  # (height, width) of the turned frames
    corners = [picture.getpixel((SIZE[1] - 1, 0)) for picture in shown]
    assert corners == [(200, 0, 0), (0, 0, 200)]
    # A still picture is a clip of one frame, read as a picture.
    still = io.BytesIO()
    clear[0].save(still, "WEBP", **options)
    (only,) = load_video(still.getvalue()).frames
    assert only.tobytes() == load_image(still.getvalue()).tobytes()


def test_only_chosen_frames_are_kept_and_only_as_far_as_needed(monkeypatch):
    reached = []
    seek = GifImagePlugin.GifImageFile.seek
    monkeypatch.setattr(
        GifImagePlugin.GifImageFile,
        "seek",
        lambda self, index: (reached.append(index), seek(self, index))[1],
    )
    load_video(animation(20), sampling=FrameSampling(max_frames=3))
    assert {*reached} <= {0, 10, 19}
    reached.clear()
    frame_sizes(animation(20))
    assert {*reached} <= {0}


GIF = animation(6)
WEBP = animation(6, "WEBP")


def outcome(content: bytes, sampling: FrameSampling) -> list[str]:
    """Read a clip in both ways; return the errors, after a check that they name it."""
    errors = []
    for read in (load_video, frame_sizes):
        try:
            read(content, "clips[3]", sampling)
        except ValueError as error:
            errors.append(str(error))
    assert all(error.startswith("clips[3] cannot be read: ") for error in errors)
    assert all(len(error) < 500 for error in errors)
    return errors


@pytest.mark.parametrize("content", [GIF, WEBP], ids=["gif", "webp"])
def test_a_clip_that_is_cut_off_is_refused(content):
    whole = 0
    for end in range(0, len(content) - 1, 7):
        errors = outcome(content[:end], FrameSampling())
        assert len(errors) in (0, 2)
        whole += not errors
    assert whole <= 5 * (content is GIF)  # of a GIF that ends between two frames


@pytest.mark.parametrize("content", [GIF, WEBP], ids=["gif", "webp"])
def test_damaged_bytes_end_in_frames_or_in_an_error_that_names_the_clip(content):
    random = np.random.default_rng(0)
    broken = 0
    for _ in range(150):
        damaged = np.frombuffer(content, np.uint8).copy()
        places = random.integers(0, len(damaged), 3)
        damaged[places] = random.integers(0, 256, 3)
        broken += bool(outcome(damaged.tobytes(), FrameSampling(4)))
    assert 10 < broken < 150


def many_frames(number: int, canvas: tuple[int, int] = (1, 1)) -> bytes:
    """A GIF of many frames of one pixel on a canvas of any size, in 18 bytes each."""
    width, height = (side.to_bytes(2, "little") for side in canvas)
    head = b"GIF89a" + width + height + b"\x80\x00\x00" + bytes(6)
    picture = b"," + bytes(4) + b"\x01\x00\x01\x00\x00\x02\x02D\x01\x00"
    return head + picture * number + b";"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (many_frames(30_000), "more than 10000 frames"),
        (many_frames(9_000, (4_000, 4_000)), "frames of 4000 x 4000 pixels lead to the last"),
        (many_frames(2, (65_000, 65_000)), "pixels"),
        (many_frames(40, (3_400, 3_400)), "take fewer of them by max_frames or fps"),
        (many_frames(0), "it has no frames"),
        (b"GIF89a", "it is cut off"),
        (b"", "it is neither a GIF"),
        (b"#EXTM3U\nfile:///etc/passwd", "it is neither a GIF"),
        (b"\x89PNG\r\n\x1a\n", "it is neither a GIF"),
    ],
)
def test_a_hostile_clip_is_refused_in_no_time(content, words):
    for read in (load_video, frame_sizes):
        started = time.process_time()
        with pytest.raises(ValueError, match=words) as error:
            read(content, "clips[3]", FrameSampling(max_frames=40))
        assert time.process_time() - started < 2
        assert "clips[3] cannot be read" in str(error.value)


def test_a_short_text_may_hold_a_clip():
    webp = io.BytesIO()
    Image.new("RGB", (1, 1)).save(webp, "WEBP", lossless=True)
    for content, frames in ((many_frames(2), 2), (webp.getvalue(), 1)):
        text = base64.b64encode(content).decode()
        assert len(text) < 100
        assert len(load_video(text).frames) == frames


def test_few_frames_of_a_large_clip_are_read(monkeypatch):
    """The bound is on the frames that are chosen, not on all that the file holds."""
    monkeypatch.setenv("TOKENFLEX_MAX_PIXELS", "10000")
    content = many_frames(40, (100, 100))
    frames = load_video(content, sampling=FrameSampling(4)).frames
    assert [picture.size for picture in frames] == [(100, 100)] * 4
    with pytest.raises(ValueError, match="take fewer of them by max_frames or fps"):
        load_video(content, sampling=FrameSampling(5))


def test_what_is_no_clip(tmp_path, folder):
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ValueError, match="holds no pictures"):
        load_video(empty)
    with pytest.raises(FileNotFoundError, match=r"video none\.gif does not exist|none\.gif"):
        load_video("none.gif")
    for name in ("clip", "frames12", "data/train/videos/clip00001/frames00"):  # valid base64
        with pytest.raises(FileNotFoundError, match=f"video file {name} does not exist"):
            load_video(name)
    with pytest.raises(ValueError, match="got an empty text"):
        load_video("")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_video(tmp_path / "none.gif")
    with pytest.raises(ValueError, match="it has no frames"):
        load_video([])
    with pytest.raises(ValueError, match=r"got \[16, 24, 3\]"):
        load_video(np.zeros((16, 24, 3), np.uint8))
    with pytest.raises(TypeError, match="got int"):
        load_video(3)
    with pytest.raises(ValueError, match="fps=2 needs a clip with times"):
        load_video(folder, sampling=FrameSampling(fps=2))
    (folder / "3.png").write_bytes(b"broken")
    with pytest.raises(ValueError, match=r"3\.png cannot be read"):
        load_video(folder)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"max_frames": 0}, ValueError),
        ({"max_frames": 2.0}, TypeError),
        ({"max_frames": True}, TypeError),
        ({"fps": 0}, ValueError),
        ({"fps": float("nan")}, ValueError),
        ({"fps": "2"}, TypeError),
    ],
)
def test_a_rule_that_makes_no_sense_is_refused(options, error):
    with pytest.raises(error, match=next(iter(options))):
        FrameSampling(**options)


def test_each_frame_of_a_folder_may_be_refused(folder):
    def refuse(path: Path) -> None:
        if path.name == "11.png":
            raise ValueError("not this one")

    assert len(load_video(folder, sampling=FrameSampling(1), check_frame=refuse).frames) == 1
    for read in (load_video, frame_sizes):
        with pytest.raises(ValueError, match="not this one"):
            read(folder, check_frame=refuse)


# ---------------------------------------------------------------------- video files

MP4 = b"\x00\x00\x00\x20ftypisom" + bytes(64)


def test_a_video_file_without_a_decoder_names_the_extra(tmp_path, monkeypatch):
    from transformers import video_utils

    for library in ("torchcodec", "av", "cv2"):
        monkeypatch.setattr(video_utils, f"is_{library}_available", lambda: False)
    (tmp_path / "a.mp4").write_bytes(MP4)
    for source in (tmp_path / "a.mp4", MP4):
        with pytest.raises(ImportError, match=r"tokenflex\[video\]"):
            load_video(source)


def test_a_decoder_gets_the_chosen_frames_alone(tmp_path, monkeypatch):
    from transformers import video_utils

    calls = []

    def decode(file, sample_indices_fn):
        metadata = video_utils.VideoMetadata(300, fps=30.0, width=SIZE[0], height=SIZE[1])
        calls.append(file)
        indices = sample_indices_fn(metadata=metadata)
        calls.append(indices.tolist())
        return np.stack([np.asarray(frame(i // 30)) for i in indices[:calls_kept]]), metadata

    for library in ("torchcodec", "cv2"):
        monkeypatch.setattr(video_utils, f"is_{library}_available", lambda: False)
    monkeypatch.setattr(video_utils, "is_av_available", lambda: True)
    monkeypatch.setitem(video_utils.VIDEO_DECODERS, "pyav", decode)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "concat:a").write_bytes(MP4)
    calls_kept = None
    sampling = FrameSampling(max_frames=4, fps=0.5)
    assert frame_sizes("concat:a", sampling=sampling) == [SIZE[::-1]] * 4
    assert calls == [str(tmp_path / "concat:a")]  # nothing was decoded, and no command given
    clip = load_video("concat:a", sampling=sampling)
    assert calls[-1] == [0, 60, 180, 240]
    assert levels(clip.frames) == [0, 2, 6, 8]
    assert clip.times == pytest.approx([0, 2, 6, 8])
    calls_kept = 3
    with pytest.raises(ValueError, match="cut off: 3 of the 4 chosen frames"):
        load_video(MP4, sampling=sampling)


def test_a_video_file_is_decoded_by_pyav(tmp_path):
    av = pytest.importorskip("av")
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height = 64, 48
        for i in range(20):
            picture = av.VideoFrame.from_image(frame(i, (64, 48)))
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
    for source in (path, path.read_bytes()):
        clip = load_video(source, sampling=FrameSampling(fps=2))
        assert levels(clip.frames) == [0, 5, 10, 15]
        assert clip.times == pytest.approx([0, 0.5, 1, 1.5])
        assert frame_sizes(source, sampling=FrameSampling(fps=2)) == [(48, 64)] * 4
    with pytest.raises(ValueError, match="cannot be read"):
        load_video(path.read_bytes()[:-700])


def test_bounds_are_those_of_the_environment(monkeypatch):
    monkeypatch.setenv("TOKENFLEX_MAX_PIXELS", str(SIZE[0] * SIZE[1]))
    assert len(load_video(GIF, sampling=FrameSampling(4)).frames) == 4
    with pytest.raises(ValueError, match="the first 5 of its chosen frames"):
        load_video(GIF, sampling=FrameSampling(5))
    monkeypatch.setattr(videos, "MAX_FRAMES", 5)
    with pytest.raises(ValueError, match="more than 5 frames"):
        load_video([frame(0)] * 6)
