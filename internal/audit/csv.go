package audit

import (
	"encoding/csv"
	"io"
	"strconv"
	"strings"
	"time"

	"github.com/eni-guard/eni-guard/internal/review"
)

// columns are those of a removal in CSV, in their order.
var csvColumns = []struct {
	name  string
	value func(review.Removal) string
}{
	{"time", func(r review.Removal) string { return r.Time.UTC().Format(time.RFC3339Nano) }},
	{"user", func(r review.Removal) string { return r.User }},
	{"impersonatedBy", func(r review.Removal) string { return r.ImpersonatedBy }},
	{"userAgent", func(r review.Removal) string { return r.UserAgent }},
	{"sourceIPs", func(r review.Removal) string { return strings.Join(r.SourceIPs, " ") }},
	{"namespace", func(r review.Removal) string { return r.Namespace }},
	{"pod", func(r review.Removal) string { return r.Pod }},
	{"uid", func(r review.Removal) string { return r.UID }},
	{"node", func(r review.Removal) string { return r.Node }},
	{"addresses", func(r review.Removal) string { return strings.Join(r.Addresses, " ") }},
	{"path", func(r review.Removal) string { return r.Path }},
	{"mode", func(r review.Removal) string { return r.Mode }},
	{"verdict", func(r review.Removal) string { return r.Verdict }},
	{"decision", func(r review.Removal) string { return string(r.Decision) }},
	{"reason", func(r review.Removal) string { return r.Reason }},
	{"overrideReason", func(r review.Removal) string { return r.OverrideReason }},
	{"evidence", func(r review.Removal) string { return r.Evidence }},
	{"code", func(r review.Removal) string { return strconv.Itoa(r.Code) }},
	{"outcome", func(r review.Removal) string { return string(r.Outcome) }},
	{"finalizers", func(r review.Removal) string { return strings.Join(r.Finalizers, " ") }},
	{"then", func(r review.Removal) string { return thenWords(r.Then) }},
	{"auditID", func(r review.Removal) string { return r.AuditID }},
}

// csv writes the removals.
func (d document) csv(out io.Writer) error {
	w := csv.NewWriter(out)
	var row []string
	for _, c := range csvColumns {
		row = append(row, c.name)
	}
	_ = w.Write(row)
	for r, err := range d.Removals() {
		if err != nil {
			return err
		}
		row = row[:0]
		for _, c := range csvColumns {
			row = append(row, noFormula(c.value(r)))
		}
		_ = w.Write(row)
	}
	// It keeps the first error of all writes.
	w.Flush()
	return w.Error()
}

// noFormula keeps a spreadsheet from calculating with what somebody has written into a user agent or a reason.
func noFormula(text string) string {
	if text != "" && strings.ContainsRune("=+-@\t\r", rune(text[0])) {
		return "'" + text
	}
	return text
}
