package healthz

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"strings"
	"time"
)

// Wait requests url every period until it answers 200, and then returns nil. One request may take requestTimeout. If
// ctx ends first, the error has the last answer.
func Wait(ctx context.Context, url string, requestTimeout, period time.Duration) error {
	client := &http.Client{
		Timeout:   requestTimeout,
		Transport: &http.Transport{DisableKeepAlives: true},
	}
	ticker := time.NewTicker(period)
	defer ticker.Stop()
	var last error
	for {
		answer := ask(ctx, client, url)
		if answer == nil {
			return nil
		}
		if last == nil || ctx.Err() == nil { // an error because ctx ended is not an answer
			last = answer
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("waiting for %s: %w; the last answer was: %v", url, ctx.Err(), last)
		case <-ticker.C:
		}
	}
}

// ask returns nil if the answer is 200, otherwise the answer as an error.
func ask(ctx context.Context, client *http.Client, url string) error {
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return err
	}
	response, err := client.Do(request)
	if err != nil {
		return err
	}
	defer response.Body.Close()
	if response.StatusCode == http.StatusOK {
		return nil
	}
	body, _ := io.ReadAll(io.LimitReader(response.Body, 1<<10))
	return fmt.Errorf("%s: %s", response.Status, strings.Join(strings.Fields(string(body)), " "))
}
