"""What keeps a long run alive: stopping, the spike sentinel, the watchdog, the run lock."""
