"""Raw videos -> shots -> clips of 4k+1 frames -> filters -> captions -> records, and a funnel that counts each step."""
