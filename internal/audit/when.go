package audit

import (
	"fmt"
	"strconv"
	"strings"
	"time"
)

// parseTime reads a time as people write it: absolute, in UTC unless it says otherwise, or how long ago. Nothing is the zero time.
func parseTime(text string, now time.Time) (time.Time, error) {
	if text == "" {
		return time.Time{}, nil
	}
	for _, layout := range []string{time.RFC3339, "2006-01-02T15:04:05", "2006-01-02 15:04:05", "2006-01-02 15:04", "2006-01-02"} {
		if t, err := time.Parse(layout, text); err == nil {
			return t, nil
		}
	}
	ago, err := time.ParseDuration(text)
	if days, found := strings.CutSuffix(text, "d"); found {
		var n int
		n, err = strconv.Atoi(days)
		ago = time.Duration(n) * 24 * time.Hour
	}
	if err != nil || ago <= 0 {
		return time.Time{}, fmt.Errorf("%q is neither a time, such as 2026-11-24 or 2026-11-24T18:00:00Z, nor how long ago, such as 90m, 24h or 7d", text)
	}
	return now.Add(-ago), nil
}
