"""Placeholders of pictures, videos and sounds in the prompts of known processors.

Training would see them as text if a record held them. Only ``<image>`` stands for a picture in a
record, and ``<video>`` for a video in one that has videos.
"""

from __future__ import annotations

import re

_WORDS = """
    <IMG_CONTEXT> <img> </img> </image> <imgpad> <|imgpad|> <image_pad> <|image_pad|> <|IMAGE_PAD|>
    <|image|> <|IMAGE|> <image_soft_token> <image_placeholder> <|image_placeholder|> <ImageHere>
    <image_here> <im_patch> <im_start> <im_end> <|patch|> <|IMG_PATCH|> <|START_OF_IMG|>
    <|END_OF_IMG|> <|IMG_LINE_BREAK|> <|img_thumbnail|> <|media_pad|> <|content_image|>
    <image_start> <image_end> <|image_start|> <|image_end|> <|IMAGE_START|> <|IMAGE_END|>
    <boi> <eoi> <start_of_image> <end_of_image> <begin_of_image> <|begin_of_image|> <|end_of_image|>
    <fake_token_around_image> <global-img> <low_res_im_start> <low_res_im_end> <image_newline>
    <patch_newline> <IMG> <IMG_ROW> <IMG_COL> <IMG_END> [IMG] [IMG_BREAK] [IMG_END] <image_token>
    <|vision_start|> <|vision_end|> <|vision_pad|> <|VISION_START|> <|VISION_END|> <|vision_eos|>
    <video> </video> <|video|> <|VIDEO|> <video_pad> <|video_pad|> <|VIDEO_PAD|> <video_soft_token>
    <|video_start|> <|video_end|> <|vid_start|> <|vid_end|> <|vid_frame_separator|>
    <|video_duration|> <start_of_video> <end_of_video> <|begin_of_video|> <|end_of_video|>
    <audio> </audio> <sound> <|audio|> <|AUDIO|> <|AUDIO_OUT|> <|AUDIO_DURATION|> <|audio_pad|>
    <|audio_comp_pad|> <audio_soft_token> <start_of_audio> <end_of_audio> <begin_of_audio>
    <|audio_start|> <|audio_end|> <|audio_bos|> <|audio_eos|> <|audio_out_bos|>
    <|sound_bos|> <|sound_eos|> <|content_audio_input|> <so_start> <so_end>
    <|soft_audio_start|> <|soft_audio_end|>
"""
PLACEHOLDERS = tuple(_WORDS.split())
"""Placeholders and marks of the processors of ``transformers`` and of other models."""

_NUMBERED = r"<\|?(?:image|img|video|audio)[ _:-]?\d+\|?>"  # one word for each picture
_PATTERN = re.compile("|".join([*map(re.escape, PLACEHOLDERS), _NUMBERED]))


def find_placeholder(text: str) -> str | None:
    """Return the first placeholder in a text, spelled exactly, or None."""
    match = _PATTERN.search(text)
    return None if match is None else match[0][:80]
