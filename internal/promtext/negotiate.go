package promtext

import (
	"fmt"
	"mime"
	"strconv"
	"strings"
)

const (
	textType        = "text/plain"
	openMetricsType = "application/openmetrics-text"
)

// ContentType returns the Content-Type of an exposition in the format.
func (f Format) ContentType() string {
	if f == OpenMetrics {
		return openMetricsType + "; version=1.0.0; charset=utf-8"
	}
	return textType + "; version=0.0.4; charset=utf-8"
}

// FormatOf returns the format of a Content-Type. An empty one means Text, the older format.
func FormatOf(contentType string) (Format, error) {
	if contentType == "" {
		return Text, nil
	}
	media, params, err := mime.ParseMediaType(contentType)
	switch {
	case err != nil:
		return 0, fmt.Errorf("Content-Type %.80q: %w", contentType, err)
	case media == textType:
		return Text, nil
	case media == openMetricsType && (params["version"] == "" || params["version"] == "0.0.1" || params["version"] == "1.0.0"):
		return OpenMetrics, nil
	}
	return 0, fmt.Errorf("Content-Type %.80q is neither %s nor %s version 1.0.0", contentType, textType, openMetricsType)
}

// Negotiate chooses the format for an Accept header. It chooses OpenMetrics only if the header names it, with version 1.0.0
// or without a version, and its q is not lower than that of text. Otherwise it chooses text, even if the header accepts
// neither.
func Negotiate(accept string) Format {
	var text, open, wild float64
	named := false
	for clause := range strings.SplitSeq(accept, ",") {
		media, params, err := mime.ParseMediaType(clause)
		if err != nil {
			continue
		}
		q := 1.0
		if params["q"] != "" {
			if q, err = strconv.ParseFloat(params["q"], 64); err != nil || !(q >= 0 && q <= 1) {
				continue
			}
		}
		switch version := params["version"]; {
		case media == openMetricsType && (version == "" || version == "1.0.0"):
			open = max(open, q)
		case media == textType && (version == "" || version == "0.0.4"):
			named, text = true, max(text, q)
		case media == "text/*" || media == "*/*":
			wild = max(wild, q)
		}
	}
	if !named {
		text = wild
	}
	if open > 0 && open >= text {
		return OpenMetrics
	}
	return Text
}

// AcceptsGzip reports whether Accept-Encoding fields name gzip, with a weight above 0 or without a weight.
func AcceptsGzip(fields []string) bool {
	for coding := range strings.SplitSeq(strings.Join(fields, ","), ",") {
		name, weight, _ := strings.Cut(coding, ";")
		if strings.EqualFold(strings.TrimSpace(name), "gzip") {
			_, q, weighted := strings.Cut(weight, "=")
			number, err := strconv.ParseFloat(strings.TrimSpace(q), 64)
			return !weighted || err == nil && number > 0
		}
	}
	return false
}
