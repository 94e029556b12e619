"""The ffmpeg program: which one, how it is fed safely, and how it is watched while it runs."""

from __future__ import annotations

# Demuxers that read exactly the file they are given. Playlists and scripts (hls, concat, dash, ffconcat,
# image2, lavfi, …), which open other files or the network, are not among them. Used by PyAV and ffmpeg alike.
FORMATS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,mpegvideo,flv,asf,ogg,gif,ivf,nut,mxf,"
    "h264,hevc,av1,obu,wtv,rm,dv,swf,m4v,y4m,yuv4mpegpipe,live_flv,apng"
)
PROTOCOLS = "file"
